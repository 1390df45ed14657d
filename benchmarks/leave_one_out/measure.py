"""Both ways on one subject: seconds in turn, memory in fresh processes, products counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.leave_one_out.subjects import SUBJECTS, Subject, batch, build, scorer
from benchmarks.merge_layer.memory import peak, resident
from surgery.importance.table import HEADS
from surgery.importance.work import BatchScores

WAYS = ("plain", "shared")


def timed(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a whole batch, plain and shared in turn; and by how much the results differ."""
    subject = SUBJECTS[name]
    model, rows = build(subject), batch(subject)
    ways = {way: scorer(model, share=way == "shared") for way in WAYS}
    first = {key: value[:1] for key, value in rows.items()}
    products = {way: _products(lambda run=run: run(first)) for way, run in ways.items()}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, BatchScores] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            started = time.perf_counter(), time.process_time()
            found[way] = run(rows)
            wall[way].append(time.perf_counter() - started[0])
            cpu[way].append(time.process_time() - started[1])
    shared = ways["shared"].shared
    pairs = list(zip(wall["plain"], wall["shared"], strict=True))
    of_cpu = list(zip(cpu["plain"], cpu["shared"], strict=True))
    return {
        **subject.to_json(),
        "heads": sum(len(row) for row in found["plain"].scores[HEADS]),
        "layers": len(found["plain"].scores[HEADS]),
        "shares": shared is not None,
        "loss": found["plain"].loss,
        "largest_score": float(torch.stack(found["plain"].scores[HEADS]).abs().max()),
        "largest_difference": _difference(found["plain"], found["shared"]),
        "gflop_of_matrix_products_per_row": {way: products[way] / 1e9 for way in WAYS},
        "products_ratio": products["plain"] / products["shared"],
        "rounds": rounds,
        "seconds": {way: median(wall[way]) for way in WAYS},
        "seconds_all": wall,
        "cpu_seconds": {way: median(cpu[way]) for way in WAYS},
        "speedup": median(plain / quick for plain, quick in pairs),
        "speedup_cpu": median(plain / quick for plain, quick in of_cpu),
    }


def memory(name: str, way: str) -> dict[str, int]:
    """What one batch takes in this process beyond the model; the plain loop over one layer."""
    subject = SUBJECTS[name]
    model, rows = build(subject), batch(subject)
    run = scorer(model, share=way == "shared", sites=None if way == "shared" else 1)
    before = resident()
    run(rows)
    return {"peak_bytes": peak(), "before_bytes": before}


def _products(function: Callable[[], object]) -> float:
    """Floating point operations of matrix products; of the second call, which compares nothing."""
    function()
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def _difference(one: BatchScores, other: BatchScores) -> float:
    mine, theirs = torch.stack(one.scores[HEADS]), torch.stack(other.scores[HEADS])
    return float((mine - theirs).abs().max())


__all__ = ["SUBJECTS", "WAYS", "Subject", "memory", "timed"]
