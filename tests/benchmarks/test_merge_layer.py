"""The merge's cost on a tiny layer: what is kept and drawn, not how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.merge_layer import merge
from benchmarks.merge_layer.__main__ import LIMITS, run
from benchmarks.merge_layer.collect import collect
from benchmarks.merge_layer.layer import PRESETS
from benchmarks.merge_layer.page import page
from surgery.lab.report.summary import describe_machine, find_versions


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            # Fresh processes cost imports alone at this size.
            patch.setattr("benchmarks.merge_layer.__main__.fresh", lambda f, *given: f(*given))
            return run(PRESETS["tiny"], repeats=2)
    finally:
        torch.set_num_threads(threads)


def test_every_phase_is_timed(figures: dict[str, Any]) -> None:
    found = figures["merge"]
    assert list(found["phases_s"]) == ["grouping", "keys", "values", "assembly", "refit solve"]
    assert all(seconds > 0 for seconds in found["phases_s"].values())
    assert found["seconds"] == pytest.approx(sum(found["phases_s"].values()))
    assert len(found["rounds_s"]) == 2
    assert found["finite"]
    assert 0 < found["losses"]["values"] < 1
    assert 0 < found["losses"]["keys"] < 1


def test_memory_is_of_the_whole_process(figures: dict[str, Any]) -> None:
    found = figures["merge"]
    assert 0 < found["resident_before_bytes"] <= found["peak_bytes"]
    assert figures["limits"] == LIMITS


def test_kept_statistics_are_as_large_as_the_widths_say(figures: dict[str, Any]) -> None:
    hidden, heads, kv_heads = 64, 8, 2
    unit, members = hidden // heads, heads // kv_heads
    values, keys = (heads * unit) ** 2 * 8, heads**2 * unit // 2 * 16 + heads * unit // 2 * 8
    attended = heads * (members * unit) ** 2 * 8
    assert figures["collecting"]["kept_bytes"] == values + attended + 2 * keys
    refit = (hidden + 1) ** 2 + (hidden + 1) * hidden + 1
    assert figures["collecting"]["kept_bytes_refit"] == refit * 8
    naive = figures["alternatives"]["hidden x hidden per head"]
    assert naive["kept_bytes"] == heads * hidden**2 * 8


def test_the_page_says_what_was_measured(figures: dict[str, Any]) -> None:
    whole = {"command": "c", **figures, "machine": describe_machine(), "versions": find_versions()}
    text = page(whole)
    assert "8 KV heads → 2" in text
    assert f"| values | {figures['merge']['phases_s']['values']:.2f} |" in text


def test_a_file_of_other_statistics_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    collect(PRESETS["tiny"], path)
    model, site, groups, *rest = torch.load(path, weights_only=False)
    torch.save((model, site, groups[::-1], *rest), path)
    with pytest.raises(AssertionError):
        merge.optimal(path, 2)
