"""The same step through TransformerLens's cache, where it is installed: JSON on the last line.

Run by `python -m benchmarks.observe` with another Python; imports nothing of this project but what
needs torch and transformers alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import ByT5Tokenizer

from benchmarks.merge_layer.memory import peak, resident
from benchmarks.observe.explicit import statistics
from benchmarks.observe.subject import PRESETS, Preset, batch, build, optimizer

PLAIN, LENS = "plain", "TransformerLens"


def step_of(preset: Preset, length: int, variant: str) -> Callable[[], None]:
    """One training step, every attention pattern cached and looked at; nothing else is cached."""
    model = build(preset, length, "sdpa")
    rows = batch(length)
    update = optimizer(model)
    run: Callable[[], torch.Tensor]
    if variant == PLAIN:

        def run() -> torch.Tensor:
            return model(**rows).loss
    else:
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = ByT5Tokenizer(extra_ids=0)
        bridge = TransformerBridge.boot_transformers(
            "llama", hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float32
        )

        def run() -> torch.Tensor:
            loss, cache = bridge.run_with_cache(
                rows["input_ids"], return_type="loss", names_filter=_is_pattern
            )
            found = [statistics(pattern, rows["input_ids"]) for pattern in cache.values()]
            if len(found) != preset.layers or not torch.stack(found)[0].isfinite().all():
                raise RuntimeError(f"{len(found)} patterns of {preset.layers} layers")
            return loss

    def step() -> None:
        run().backward()
        update.step()
        update.zero_grad()

    return step


def _is_pattern(name: str) -> bool:
    return name.endswith("hook_pattern")


def timed(preset: Preset, length: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each in turn, by the clock and of this process, after one that does not count."""
    steps = {name: step_of(preset, length, name) for name in (PLAIN, LENS)}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(preset.rounds_of(length) + 1):
        for name in sorted(steps, reverse=bool(number % 2)):
            started = time.perf_counter(), time.process_time()
            steps[name]()
            if number:
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    return {"wall": wall, "cpu": cpu}


def memory(preset: Preset, length: int, variant: str) -> dict[str, int]:
    """What three steps take in this process beyond the model."""
    step = step_of(preset, length, variant)
    before = resident()
    for _ in range(3):
        step()
    return {"peak_bytes": peak(), "before_bytes": before}


def main() -> None:
    """Arguments: preset, length, and the variant whose memory is asked for; without it: times."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    preset, length, *variant = sys.argv[1:]
    found: dict[str, Any] = {"version": version("transformer-lens")}
    if variant:
        found |= memory(PRESETS[preset], int(length), *variant)
    else:
        found |= timed(PRESETS[preset], int(length))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
