"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.config.schema import MeasureConfig, Task
from surgery.console import track_progress
from surgery.data.collate import IGNORED, Batch
from surgery.data.module import TextData
from surgery.models.packed import make_inputs


def measure_held_out_loss(
    model: PreTrainedModel, data: TextData, cfg: MeasureConfig, task: Task, *, label: str
) -> float:
    """Measure the mean negative log-likelihood of held-out windows, in nats per token (or row).

    There are `cfg.windows` windows, the same ones at every call.
    """
    total = math.ceil(min(cfg.windows, data.held_out_size) / cfg.batch_size)
    batches = data.load_held_out_batches(cfg.windows, cfg.batch_size)
    return compute_mean_loss(model, batches, task, total=total, label=label)


@torch.inference_mode()
def compute_mean_loss(
    model: PreTrainedModel, batches: Iterable[Batch], task: Task, *, total: int, label: str
) -> float:
    """Compute the mean negative log-likelihood of `batches`, in nats per labelled token (or row).

    Args:
        total: number of batches, for the progress bar.
    """
    device = next(model.parameters()).device
    nll, count = 0.0, 0
    with track_progress(f"held-out loss, {label}", total) as steps:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**make_inputs(model, batch)).logits
            if task is Task.causal_lm:
                logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            nll += float(
                F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
            )
            count += int((labels != IGNORED).sum())
            steps.advance()
    return nll / max(1, count)
