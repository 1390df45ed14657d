"""One column of the final table: everything that is measured at one moment of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.config.schema import MeasureConfig, Task
from surgery.data.module import TextData
from surgery.measure.loss import WindowLosses, measure_window_losses
from surgery.measure.speed import measure_speed
from surgery.models.forward import evaluating
from surgery.models.sites import find_sites
from surgery.plan.operation import Operation
from surgery.plan.sizes import count_sizes

PARTS = 16  # of a window, in the loss by position


@dataclass(frozen=True)
class Measurement:
    """Losses in nats per token, times in milliseconds; docs/outputs.md explains each.

    Attributes:
        windows: the loss window by window, which is not in the JSON.
    """

    windows: WindowLosses
    loss: float
    perplexity: float
    parameters: int
    kv_bytes: int
    kv_bytes_per_token: float
    cache_bytes_per_token: float | None
    attention_flops: int
    prefill_ms: float
    decode_ms: float | None
    loss_by_position: list[tuple[int, int, float | None]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "windows"}


def measure_model(
    model: PreTrainedModel,
    data: TextData,
    cfg: MeasureConfig,
    task: Task,
    *,
    label: str,
    tokens: int | None = None,
    operations: Sequence[Operation] = (),
) -> Measurement:
    """Measure `model` on the held-out documents of `data`. Its training mode stays as it was.

    Args:
        tokens: length at which sizes are counted; by default the length of a window of `data`.
        operations: performed on `model`; they know of sizes that heads and windows do not tell.
    """
    with evaluating(model):
        windows = measure_window_losses(model, data, cfg, task, label=label)
        prompt = _make_prompt(model, data, cfg.prefill_tokens, cfg.decode_tokens)
        speed = measure_speed(
            model, prompt, task, decode_tokens=cfg.decode_tokens, repeats=cfg.repeats
        )
    tokens = tokens or data.cfg.seq_len
    parameters = sum(p.numel() for p in model.parameters())
    sizes = count_sizes(parameters, find_sites(model).sites, tokens, model.dtype.itemsize)
    for operation in operations:
        sizes = operation.adjust_sizes(sizes, tokens)
    return Measurement(
        windows=windows,
        loss=windows.mean,
        perplexity=math.exp(min(windows.mean, 700.0)),
        parameters=sizes.parameters,
        kv_bytes=sizes.kv_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        cache_bytes_per_token=speed.cache_bytes_per_token,
        attention_flops=sizes.attention_flops,
        prefill_ms=speed.prefill_ms,
        decode_ms=speed.decode_ms,
        loss_by_position=windows.split_by_position(PARTS),
    )


def _make_prompt(model: PreTrainedModel, data: TextData, tokens: int, more: int) -> torch.Tensor:
    """Make a prompt [1, tokens] from held-out text; a short row is repeated.

    The prompt is shortened if the model has no positions for `more` generated tokens after it.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int):
        tokens = min(tokens, max(1, limit - more))
    row = next(data.load_held_out_batches(1, 1))["input_ids"][:1]
    return row.repeat(1, math.ceil(tokens / row.shape[1]))[:, :tokens]
