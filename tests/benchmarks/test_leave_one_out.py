"""Leave-one-out's figures on a tiny model: what is kept and drawn, not how fast anything is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.leave_one_out.__main__ import WANTED, run
from benchmarks.leave_one_out.page import page
from benchmarks.leave_one_out.subjects import SUBJECTS, batch
from surgery.lab.report.summary import describe_machine, find_versions


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Fresh processes cost imports alone at this size.
        patch.setattr("benchmarks.leave_one_out.__main__.fresh", lambda f, *given: f(*given))
        return run(["tiny"], rounds=2)


def test_both_ways_are_timed_and_agree(figures: dict[str, Any]) -> None:
    (found,) = figures["subjects"]
    assert found["shares"]
    assert found["heads"] == 4
    assert found["layers"] == 2
    assert all(len(seconds) == 2 for seconds in found["seconds_all"].values())
    assert found["seconds"]["plain"] == pytest.approx(sum(found["seconds_all"]["plain"]) / 2)
    assert found["largest_difference"] < 1e-6 < found["largest_score"]
    assert figures["wanted"] == WANTED


def test_products_are_those_that_layers_need(figures: dict[str, Any]) -> None:
    """By hand: 2 layers of 2 heads of 32, hidden 64, MLP 176, 259 bytes; a row of 16."""
    (found,) = figures["subjects"]
    attention, mlp, head = 4 * 64 * 64, 3 * 64 * 176, 64 * 259
    whole = 2 * (attention + mlp) * 16 + head * 16
    plain = 2 * (1 + 4) * whole / 1e9
    # Of each head: its rank of the output projection, the MLP, what is above, judged positions.
    above = (attention + mlp) * 16
    each = 32 * 64 * 16 + mlp * 16 + head * 15
    shared = 2 * (whole + 4 * each + 2 * above) / 1e9
    counted = found["gflop_of_matrix_products_per_row"]
    assert counted["plain"] == pytest.approx(plain, rel=1e-6)
    assert counted["shared"] == pytest.approx(shared, rel=1e-6)


def test_memory_is_of_the_whole_process(figures: dict[str, Any]) -> None:
    (found,) = figures["subjects"]
    for taken in found["memory"].values():
        assert 0 < taken["before_bytes"] <= taken["peak_bytes"]


def test_the_page_says_what_was_measured(figures: dict[str, Any]) -> None:
    whole = {"command": "c", **figures, "machine": describe_machine(), "versions": find_versions()}
    text = page(whole)
    (found,) = figures["subjects"]
    assert f"| {found['speedup']:.2f} |" in text
    assert "is not reached" in page({**whole, "wanted": found["speedup"] + 1})
    assert "and is reached" in page({**whole, "wanted": found["speedup"] - 0.1})


def test_windows_are_bytes_as_tokens() -> None:
    rows = batch(SUBJECTS["tiny"])
    assert rows["input_ids"].shape == (2, 16)
    assert torch.equal(rows["input_ids"], rows["labels"])
    assert int(rows["input_ids"].min()) >= 3
    assert int(rows["input_ids"].max()) < 259
