"""Times in turn, and memory in fresh processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.merge_layer.memory import peak, resident
from benchmarks.observe.subject import Preset, build
from benchmarks.observe.variants import PICTURED, PLAIN, VARIANTS, WATCHED, fit

CADENCE, PICTURES = 25, 100  # the callback's defaults


def timed(preset: Preset, length: int) -> dict[str, Any]:
    """Seconds of every variant; ratios are of the same round. The first round does not count.

    Each round begins with another variant, so that none always follows the same one.
    """
    rounds = preset.rounds_of(length) + 1
    orders = [_turned(VARIANTS, number) for number in range(rounds)]
    seconds = iter(fit(preset, length, [name for order in orders for name in order]))
    found = [{name: next(seconds) for name in order} for order in orders][1:]
    wall = {name: [one[name].wall for one in found] for name in VARIANTS}
    cpu = {name: [one[name].cpu for one in found] for name in VARIANTS}
    return spread(wall, cpu)


def spread(
    wall: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Medians, and the ratio to the plain step of each round: median, lowest, highest."""
    result = {}
    for name, values in wall.items():
        ratios = _ratios(values, wall[PLAIN])
        result[name] = {
            "seconds": median(values),
            "all": list(values),
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "cpu_all": list(cpu[name]),
            "cpu_ratio": median(_ratios(cpu[name], cpu[PLAIN])),
        }
    return result


def _ratios(values: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [one / base for one, base in zip(values, plain, strict=True)]


def at_default(found: Mapping[str, Any]) -> float:
    """Share of a plain step that the default cadence adds to each: one in 25 observed, one in 100
    drawn."""
    watched, drawn = found[WATCHED]["ratio"], found[PICTURED]["ratio"]
    return float((watched - 1) / CADENCE + (drawn - watched) / PICTURES)


def blocks(preset: Preset, length: int) -> dict[str, Any]:
    """25 steps, one of them observed, against 25 that are not, in turn; every fourth time with
    its pictures."""
    schedule = [PLAIN] * 3  # to warm up
    for number in range(preset.blocks):
        seen = PICTURED if number % (PICTURES // CADENCE) == 0 else WATCHED
        pair = [[seen, *[PLAIN] * (CADENCE - 1)], [PLAIN] * CADENCE]
        schedule += [name for block in (pair if number % 2 else pair[::-1]) for name in block]
    seconds = [one.wall for one in fit(preset, length, schedule)[3:]]
    sums = [sum(seconds[at : at + CADENCE]) for at in range(0, len(seconds), CADENCE)]
    pairs = [(sums[at], sums[at + 1]) for at in range(0, len(sums), 2)]
    ordered = [pair if number % 2 else pair[::-1] for number, pair in enumerate(pairs)]
    whole = sum(with_it for with_it, _ in ordered) / sum(without for _, without in ordered)
    return {"overhead": whole - 1, "pairs": [list(pair) for pair in ordered]}


def memory(preset: Preset, length: int, variant: str) -> dict[str, int]:
    """What three steps take in this process beyond the model."""
    build(preset, length, "sdpa")  # what imports and a first model take is no part of it
    before = resident()
    fit(preset, length, [variant] * 3, logged=False)
    return {"peak_bytes": peak(), "before_bytes": before}


def middle(found: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Of several processes the one that took a middling lot, and what each of them took."""
    taken = sorted((one["peak_bytes"] - one["before_bytes"], n) for n, one in enumerate(found))
    chosen = found[taken[len(taken) // 2][1]]
    return {**chosen, "all_bytes": [bytes_ for bytes_, _ in taken]}


def _turned(names: Sequence[str], by: int) -> list[str]:
    at = by % len(names)
    return [*names[at:], *names[:at]]
