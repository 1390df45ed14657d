"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.config.schema import MeasureConfig, Task
from surgery.console import track_progress
from surgery.data.collate import IGNORED, Batch
from surgery.data.module import TextData
from surgery.models.packed import make_inputs

_AT_ONCE = 4096  # tokens whose loss is computed at a time


@dataclass(frozen=True)
class WindowLosses:
    """Losses of single windows, in nats: what a mean loss is made of, and its noise.

    Attributes:
        sums: [windows], sum over the labelled tokens of each window.
        counts: [windows], number of these tokens.
        position_sums: [positions], the same losses summed over windows, by the label's position in
            its window from 0.
        position_counts: [positions], number of labelled tokens.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    position_sums: torch.Tensor = field(default_factory=lambda: torch.zeros(0).double())
    position_counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0).double())

    @property
    def mean(self) -> float:
        """Mean over all labelled tokens."""
        return float(self.sums.sum() / self.counts.sum().clamp(min=1))

    def split_by_position(self, parts: int) -> list[tuple[int, int, float | None]] | None:
        """Compute the mean loss of each part of a window.

        Args:
            parts: how many of equal length; fewer if a window is shorter.

        Returns:
            First position, last position, and loss; ``None`` for a part without labels. ``None``
            in place of the list if a window has one label.
        """
        length = len(self.position_sums)
        if length < 2:
            return None
        parts = min(parts, length)
        found: list[tuple[int, int, float | None]] = []
        for part in range(parts):
            first, end = part * length // parts, (part + 1) * length // parts
            count = float(self.position_counts[first:end].sum())
            loss = float(self.position_sums[first:end].sum()) / count if count else None
            found.append((first, end - 1, loss))
        return found

    def compute_error(self, other: WindowLosses) -> float | None:
        """Compute the standard error of the difference of the means, over the same windows.

        The windows are a random sample of text; the mean is a ratio of sums (Cochran 1977,
        Sampling Techniques, eq. 6.13). ``None`` where there is one window.
        """
        windows = len(self.sums)
        if windows < 2 or not torch.equal(self.counts, other.counts):
            return None
        difference = self.sums - other.sums
        spread = difference - difference.sum() / self.counts.sum().clamp(min=1) * self.counts
        variance = windows / (windows - 1) * spread.square().sum()
        return float(variance.sqrt() / self.counts.sum().clamp(min=1))


def measure_held_out_loss(
    model: PreTrainedModel, data: TextData, cfg: MeasureConfig, task: Task, *, label: str
) -> float:
    """Measure the mean negative log-likelihood of held-out windows, in nats per token (or row).

    There are `cfg.windows` windows, the same ones at every call.
    """
    return measure_window_losses(model, data, cfg, task, label=label).mean


def measure_window_losses(
    model: PreTrainedModel, data: TextData, cfg: MeasureConfig, task: Task, *, label: str
) -> WindowLosses:
    """Measure the negative log-likelihood of each of these windows."""
    total = math.ceil(min(cfg.windows, data.held_out_size) / cfg.batch_size)
    batches = data.load_held_out_batches(cfg.windows, cfg.batch_size)
    return compute_window_losses(model, batches, task, total=total, label=label)


def compute_mean_loss(
    model: PreTrainedModel, batches: Iterable[Batch], task: Task, *, total: int, label: str
) -> float:
    """Compute the mean negative log-likelihood of `batches`, in nats per labelled token (or row).

    Args:
        total: number of batches, for the progress bar.
    """
    return compute_window_losses(model, batches, task, total=total, label=label).mean


@torch.inference_mode()
def compute_window_losses(
    model: PreTrainedModel, batches: Iterable[Batch], task: Task, *, total: int, label: str
) -> WindowLosses:
    """Compute the negative log-likelihood of each row of `batches`, summed over its labels.

    Args:
        total: number of batches, for the progress bar.
    """
    device = next(model.parameters()).device
    sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    position_sums = position_counts = torch.zeros(0, dtype=torch.float64)
    with track_progress(f"held-out loss, {label}", total) as steps:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")
            rows = len(labels)
            logits = model(**make_inputs(model, batch)).logits
            shift = task is Task.causal_lm
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            nll = _compute_token_losses(logits, labels).reshape(rows, -1)
            known = (labels != IGNORED).reshape(rows, -1)
            sums.append(nll.sum(1).cpu().double())
            counts.append(known.sum(1).cpu().double())
            if shift:  # the first token of a window has no label
                nll, known = F.pad(nll, (1, 0)), F.pad(known, (1, 0))
            position_sums = _add_ragged(position_sums, nll.cpu().double().sum(0))
            position_counts = _add_ragged(position_counts, known.cpu().double().sum(0))
            steps.advance()
    return WindowLosses(torch.cat(sums), torch.cat(counts), position_sums, position_counts)


def _compute_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] losses of logits [N, V], 0 without a label; a part at a time, since each is copied."""
    return torch.cat(
        [
            F.cross_entropy(part.float(), label, ignore_index=IGNORED, reduction="none")
            for part, label in zip(logits.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
        ]
    )


def _add_ragged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Add vectors of unlike length; what the shorter one lacks is 0."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return longer + F.pad(shorter, (0, len(longer) - len(shorter)))
