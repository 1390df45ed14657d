"""Two processes see together what one process sees of the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from surgery.callbacks import AttentionStatistics, HeadImportance

from tests.callbacks.fitting import OwnModule, fit
from tests.callbacks.two_ranks import STEPS, alarms, batch
from tests.tiny_models import tiny_model
from tests.two_processes import run_script


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("ranks")
    run_script("tests.callbacks.two_ranks", root)
    return root, [torch.load(root / f"rank{rank}.pt") for rank in (0, 1)]


def test_figures_equal_those_of_one_process(
    ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """One process that accumulates both ranks' batches takes the same steps, so all stay equal."""
    monitors = [HeadImportance(1, 1), AttentionStatistics(1, 1, rows=None)]
    judge = alarms()
    fit(
        OwnModule(tiny_model("llama"), lr=0.1),
        [batch(step, rank) for step in range(STEPS) for rank in (0, 1)],
        [*monitors, judge],
        tmp_path,
        accumulate_grad_batches=2,
    )
    assert judge.alarms
    for of_rank in ranks[1]:  # all of them come to the same conclusion, and stop
        assert [(a["alarm"], a["step"], a["layer"], a["head"]) for a in of_rank["alarms"]] == [
            (a["alarm"], a["step"], a["layer"], a["head"]) for a in judge.alarms
        ]
        assert of_rank["stop"]
    for monitor in monitors:
        for of_rank in ranks[1]:
            observed = of_rank["observed"][type(monitor).__name__]
            assert [seen["step"] for seen in observed] == list(range(STEPS))
            for got, expected in zip(observed, monitor.observations, strict=True):
                assert got["heads"] == expected["heads"] == [4, 4]
                for name, figures in expected["metrics"].items():
                    torch.testing.assert_close(
                        got["metrics"][name], figures, rtol=1e-4, atol=1e-6, equal_nan=True
                    )


def test_the_table_is_written_once_and_whole(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    table = pq.read_table(ranks[0] / "heads.parquet")
    assert table.num_rows == STEPS * 2 * 4
    assert table["head_importance"].null_count == 0


def test_ranks_may_have_seen_unlike_sites(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for of_rank in ranks[1]:
        assert of_rank["means"] == {
            "x": [1.0, 2.0],
            "y": [1.5, 2.5],
            "z": [2.0, 3.0],
            "w": [3.0],
        }
