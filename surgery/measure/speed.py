"""Prefill and decode time of one sequence, and the real size of its cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from surgery.config.schema import Task
from surgery.models.forward import get_cache

# Rounds that do not count, until caches, thread pools and clocks have settled.
WARM_UP = 3


class Speed(NamedTuple):
    """Median times in milliseconds; bytes per token of the cache that transformers allocates."""

    prefill_ms: float
    decode_ms: float | None
    cache_bytes_per_token: float | None


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel, input_ids: torch.Tensor, task: Task, *, decode_tokens: int, repeats: int
) -> Speed:
    """Time the prefill of one prompt, then greedy decoding.

    Models that do not generate (encoders, classifiers) have no decode time.

    Args:
        input_ids: [1, N], the prompt.
        decode_tokens: number of tokens generated one by one; `decode_ms` is per token.
    """
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    if task is not Task.causal_lm:
        prefill = [
            _time_call(device, lambda: model(input_ids=input_ids)) for _ in range(WARM_UP + repeats)
        ]
        return Speed(1e3 * median(prefill[WARM_UP:]), None, None)
    prefills, decodes = [], []
    bytes_per_token = None
    for _ in range(WARM_UP + repeats):
        state: dict[str, Any] = {}

        def prefill_once() -> None:
            state["out"] = model(input_ids=input_ids, use_cache=True)  # noqa: B023

        def decode_all() -> None:
            for _ in range(decode_tokens):
                out = state["out"]  # noqa: B023
                token = out.logits[:, -1:].argmax(-1)
                state["out"] = model(  # noqa: B023
                    input_ids=token, **get_cache(model, out), use_cache=True
                )

        prefills.append(_time_call(device, prefill_once))
        if bytes_per_token is None:
            total = sum(map(_count_cache_bytes, get_cache(model, state["out"]).values()))
            bytes_per_token = total / input_ids.shape[1]
        decodes.append(_time_call(device, decode_all) / decode_tokens)
    return Speed(1e3 * median(prefills[WARM_UP:]), 1e3 * median(decodes[WARM_UP:]), bytes_per_token)


def _time_call(device: torch.device, work: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _count_cache_bytes(cache: Any) -> int:
    total = 0
    for layer in getattr(cache, "layers", []):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total
