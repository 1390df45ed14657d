"""Peaks of memory: a stage has its own, and those of the stages within it."""

from __future__ import annotations

import sys

import pytest
import torch

from surgery.pipeline.memory import MemoryWatch, merge_peaks

MB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells peaks by stage")
def test_a_stage_has_its_own_peak_and_those_within_it() -> None:
    watch = MemoryWatch()
    watch.begin()
    torch.ones(300 * MB, dtype=torch.uint8)  # before the inner stage, and gone again
    watch.begin()
    first = watch.end()["process"] or 0
    watch.begin()
    torch.ones(200 * MB, dtype=torch.uint8)
    second = watch.end()["process"] or 0
    whole = watch.end()["process"] or 0
    assert first > 0
    assert second - first == pytest.approx(200 * MB, abs=40 * MB)
    assert whole - first == pytest.approx(300 * MB, abs=40 * MB)


def test_the_larger_peak_counts() -> None:
    one = {"process": 3, "gpu": None}
    assert merge_peaks(one, {"process": 5, "gpu": None}) == {"process": 5, "gpu": None}
    assert merge_peaks(one, {"process": None, "gpu": 2}) == {"process": 3, "gpu": 2}
