"""Time of attention blocks and of the whole model, before and after, in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.models.sites import find_sites

WARM_UP = 2


@torch.inference_mode()
def paired(
    models: Mapping[str, PreTrainedModel], batch: int, length: int, rounds: int
) -> dict[str, Any]:
    """One forward pass of each model per round, after a warm-up; no cache.

    Returns:
        Per model the milliseconds of its attention blocks (projections included) and of the whole
        pass, medians over rounds; and ratios first / last of the same round, as median and spread.
    """
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    found: dict[str, dict[str, list[float]]] = {
        name: {"attention": [], "whole": []} for name in models
    }
    for number in range(WARM_UP + rounds):
        for name, model in models.items():
            device = next(model.parameters()).device
            given = tokens.to(device)
            with _clocked(model) as spent:
                start = _now(device)
                model(input_ids=given, use_cache=False)
                whole = _now(device) - start
            if number >= WARM_UP:
                found[name]["attention"].append(1e3 * sum(spent))
                found[name]["whole"].append(1e3 * whole)
    first, last = found[next(iter(found))], found[next(reversed(found))]
    ratios = {part: [a / b for a, b in zip(first[part], last[part], strict=True)] for part in first}
    return {
        "batch": batch,
        "tokens": length,
        "rounds": rounds,
        "ms": {
            name: {part: median(v) for part, v in parts.items()} for name, parts in found.items()
        },
        "speedup": {
            part: {"median": median(v), "min": min(v), "max": max(v)} for part, v in ratios.items()
        },
    }


@contextmanager
def _clocked(model: PreTrainedModel) -> Iterator[list[float]]:
    spent: list[float] = []
    started: list[float] = []
    handles = []
    device = next(model.parameters()).device
    for site in find_sites(model).sites:
        block = model.get_submodule(site.block)
        handles.append(block.register_forward_pre_hook(lambda *_: started.append(_now(device))))
        handles.append(
            block.register_forward_hook(lambda *_: spent.append(_now(device) - started.pop()))
        )
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
