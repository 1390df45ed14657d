"""The merge benchmark: its arithmetic, its store, and a tiny grid from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.merge_quality.evaluate import evaluate
from benchmarks.merge_quality.figures import derive, find, times_smaller
from benchmarks.merge_quality.grid import NO_TRAINING, ORIGINAL, WHOLE, Cell, cells, kv_heads
from benchmarks.merge_quality.presets import FULL
from benchmarks.merge_quality.rates_page import rates_section
from benchmarks.merge_quality.schedule import RefusedError, go
from benchmarks.merge_quality.store import Store
from benchmarks.shared import settings
from benchmarks.shared.settings import warmup_steps
from benchmarks.shared.weights import MixedWeightsError
from surgery.config.schema import Task
from surgery.measure.loss import compute_mean_loss
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]


def record(cell: Cell, loss: float, kl: float = 1.0, weights: str = "w") -> dict[str, Any]:
    return cell.to_json() | {
        "loss": loss,
        "kl": kl,
        "agreement": 0.5,
        "entropy": 2.0,
        "weights": weights,
        "seconds": {"evaluate": 1.0},
    }


def made_up(kind: str, seed: int, losses: dict[tuple[str, float, str], float]) -> list[Any]:
    """Records at 4:1 by (merge, share, objective)."""
    return [
        record(Cell(kind, seed, merge, WHOLE if merge == ORIGINAL else "4:1", share, objective), x)
        for (merge, share, objective), x in losses.items()
    ]


def losses(optimal: float, optimal_healed: float) -> dict[tuple[str, float, str], float]:
    return {
        (ORIGINAL, 0.0, NO_TRAINING): 1.0,
        (ORIGINAL, 0.05, "lm"): 0.9,
        ("mean", 0.0, NO_TRAINING): 3.0,
        ("aligned_renorm", 0.0, NO_TRAINING): 1.8,
        ("optimal", 0.0, NO_TRAINING): optimal,
        ("mean", 0.05, "distill"): 1.2,
        ("optimal", 0.05, "distill"): optimal_healed,
        ("mean", 0.05, "lm"): 0.95,
        ("optimal", 0.05, "lm"): 0.909,
    }


def test_figures_of_one_model() -> None:
    derived = derive(made_up("a", 0, losses(optimal=1.2, optimal_healed=1.02)))
    groups = derived["groups"]
    untrained = find(groups, "optimal", "4:1", 0.0, NO_TRAINING)
    assert untrained is not None
    assert untrained["kinds"]["a"]["gap"] == pytest.approx(0.2)
    assert untrained["all"]["gap_control"] == pytest.approx(0.2)  # no training: the original
    assert untrained["all"]["share_of_mean"] == pytest.approx(0.1)
    assert untrained["all"]["share_of_aligned_renorm"] == pytest.approx(0.25)
    distilled = find(groups, "optimal", "4:1", 0.05, "distill")
    assert distilled is not None
    assert distilled["all"]["closed"] == pytest.approx(0.99)
    assert distilled["all"]["closed_control"] == pytest.approx(0.94)
    assert distilled["all"]["share_of_mean"] == pytest.approx(0.1)
    assert distilled["all"]["share_of_mean_control"] == pytest.approx(0.4)
    assert times_smaller(distilled["all"]["share_of_mean"]) == pytest.approx(10)
    # Better than the original, so that no share of mean's gap is a number; against the control
    # there is a gap.
    trained = find(groups, "optimal", "4:1", 0.05, "lm")
    assert trained is not None
    assert trained["all"]["closed"] == pytest.approx(1.0455)
    assert trained["all"]["share_of_mean"] is None
    assert trained["all"]["closed_control"] == pytest.approx(0.9955)
    assert trained["all"]["share_of_mean_control"] == pytest.approx(0.18)
    reached = {(t["figure"], t["share"], t["objective"]): t["reached"] for t in derived["targets"]}
    assert reached == {
        ("share_of_mean", 0.0, "none"): True,
        ("share_of_aligned_renorm", 0.0, "none"): True,
        ("closed", 0.05, "distill"): True,
        ("share_of_mean", 0.05, "distill"): True,
        ("closed_control", 0.05, "distill"): False,
        ("share_of_mean_control", 0.05, "distill"): False,
        ("closed", 0.05, "lm"): True,
        ("share_of_mean", 0.05, "lm"): None,
        ("closed_control", 0.05, "lm"): True,
        ("share_of_mean_control", 0.05, "lm"): True,
    }


def test_medians_over_seeds_then_over_models() -> None:
    optimal = {"a": (1.2, 1.4, 2.8), "b": (2.0,), "c": (1.1, 1.3)}  # shares of mean's gap of 2
    records = [
        one
        for kind, values in optimal.items()
        for seed, value in enumerate(values)
        for one in made_up(kind, seed, losses(value, 1.02))
    ]
    derived = derive(records)
    group = find(derived["groups"], "optimal", "4:1", 0.0, NO_TRAINING)
    assert group is not None
    shares = {kind: figures["share_of_mean"] for kind, figures in group["kinds"].items()}
    assert shares == pytest.approx({"a": 0.2, "b": 0.5, "c": 0.1})
    assert group["spread"]["a"]["share_of_mean"] == pytest.approx([0.1, 0.9])
    assert group["all"]["share_of_mean"] == pytest.approx(0.2)
    assert group["seeds"] == {"a": [0, 1, 2], "b": [0], "c": [0, 1]}
    assert derived["targets"][0]["reached"] is False


def test_what_is_missing_is_no_number() -> None:
    derived = derive([record(Cell("a", 0, "mean", "4:1", 0.0, NO_TRAINING), 2.0)])
    (group,) = derived["groups"]
    assert group["all"]["loss"] == 2.0
    assert group["all"]["gap"] is group["all"]["share_of_mean"] is None
    assert all(target["reached"] is None for target in derived["targets"])


def test_cells_of_other_weights_do_not_mix() -> None:
    cell = Cell("a", 0, "mean", "4:1", 0.0, NO_TRAINING)
    other = Cell("a", 0, "first", "4:1", 0.0, NO_TRAINING)
    with pytest.raises(MixedWeightsError, match="a-0"):
        derive([record(cell, 2.0), record(other, 2.0, weights="v")])


def test_the_grid_is_whole_and_begins_with_what_matters() -> None:
    found = cells(
        list(FULL.kinds), FULL.seeds, FULL.merges, FULL.ratios, FULL.shares, FULL.objectives
    )
    assert len(found) == len(set(found)) == 3 * 3 * (3 + 5 * 3 * 5)
    untrained = [cell for cell in found if not cell.share]
    assert found[: len(untrained)] == untrained
    healed = found[len(untrained) :]
    first = healed[: 3 * 3 * 3]
    assert {(c.ratio, c.share, c.objective) for c in first} == {("4:1", 0.05, "distill")}
    assert {c.merge for c in first} == {"mean", "optimal", "aligned_renorm"}
    then = healed[3 * 3 * 3 : 3 * 3 * 7]
    assert {(c.share, c.objective) for c in then} == {(0.05, "lm")}
    assert {c.merge for c in then} == {ORIGINAL, "mean", "optimal", "aligned_renorm"}
    fewer = cells(
        list(FULL.kinds),
        FULL.seeds,
        FULL.merges,
        FULL.ratios,
        FULL.shares,
        FULL.objectives,
        FULL.healed_seeds,
    )
    assert [cell for cell in found if not cell.share or not cell.seed] == fewer
    assert [kv_heads(r, 8) for r in ("1:1", "2:1", "4:1", "MQA")] == [8, 4, 2, 1]


def test_healing_is_a_share_of_the_training() -> None:
    steps = {kind: [FULL.healing_steps(kind, s) for s in FULL.shares] for kind in FULL.kinds}
    assert steps == {"embedded": [0, 26, 130], "qwen3": [0, 7, 35], "gpt2": [0, 7, 35]}
    assert FULL.tokens(2600) == 10_649_600
    assert [warmup_steps(steps) for steps in (7, 26, 35, 130)] == [2, 2, 3, 10]


def _rated(merge: str, rate: float, loss: float, tuning_loss: float) -> dict[str, Any]:
    cell = Cell("a", 0, merge, WHOLE if merge == ORIGINAL else "4:1", 0.05, "lm", rate)
    return record(cell, loss) | {"tuning_loss": tuning_loss}


def test_rates_are_chosen_on_windows_that_no_figure_is_taken_from() -> None:
    tried = [
        _rated(ORIGINAL, 1.0, loss=0.95, tuning_loss=0.8),
        _rated(ORIGINAL, 0.2, loss=0.9, tuning_loss=0.7),
        _rated("mean", 1.0, loss=1.5, tuning_loss=1.5),
        _rated("mean", 0.2, loss=1.4, tuning_loss=1.6),  # better, where it must not count
        _rated("optimal", 1.0, loss=1.3, tuning_loss=1.2),
        _rated("optimal", 0.2, loss=1.05, tuning_loss=1.1),
    ]
    grid = made_up("a", 0, losses(optimal=1.2, optimal_healed=1.02))
    derived = derive([*grid, *tried])
    without = derive(grid)
    assert {name: derived[name] for name in without} == without
    group = find(derived["at_best"]["groups"], "optimal", "4:1", 0.05, "lm")
    assert group is not None
    assert group["all"]["gap"] == pytest.approx(0.05)
    assert group["all"]["share_of_mean"] == pytest.approx(0.05 / 0.5)
    assert group["all"]["share_of_mean_control"] == pytest.approx(0.15 / 0.6)
    assert group["all"]["closed"] == pytest.approx(1 - 0.05 / 2)  # of mean's with no training
    assert find(derived["at_best"]["groups"], "mean", "4:1", 0.05, "distill") is None
    chosen = {(c["merge"], c["rate"]) for c in derived["at_best"]["chosen"]}
    assert chosen == {(ORIGINAL, 0.2), ("mean", 1.0), ("optimal", 0.2)}
    section = "\n".join(rates_section(derived | {"cells": [*grid, *tried]}))
    assert "| a | 0 | mean | lm | **0.5000** | 0.4000 |" in section
    assert "| a | 0 | optimal | lm | 0.3000 | **0.0500** |" in section


def test_the_windows_that_choose_a_rate_are_not_those_that_figures_come_from() -> None:
    data = settings.text(settings.run_config("embedded", FULL, 0))
    apart = [
        {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}
        for batches in (settings.held_out(data, FULL), settings.tuning(data, FULL))
    ]
    assert [len(windows) for windows in apart] == [FULL.held_out_windows] * 2
    assert not apart[0] & apart[1]


CUT_OFF = """
import os, signal, sys
from pathlib import Path
from benchmarks.merge_quality.store import Store
store, line = Store(Path(sys.argv[1])), Path(sys.argv[2]).read_text()
import json
for cell in json.loads(line)[:2]:
    store.append("cell", cell)
with store.path.open("ab") as file:
    file.write(b'{"cell": {"kind": "a", "se')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    todo = cells(["a"], [0], ["mean", "first"], ["4:1"], [0.0, 0.05], ["lm"])
    store = Store(tmp_path / "deep" / "cells.jsonl")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([record(cell, 1.0) for cell in todo]))
    command = [sys.executable, "-c", CUT_OFF, str(store.path), str(records)]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert list(store.cells()) == [cell.key for cell in todo[:2]]

    asked: list[Cell] = []

    def measure(cell: Cell) -> dict[str, Any]:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(cell)
        return record(cell, 2.0)

    with pytest.raises(KeyboardInterrupt):
        go(todo, store, measure)
    assert asked == [todo[2]]
    assert len(store.cells()) == 3

    go(todo, store, lambda cell: record(cell, 3.0))
    assert [r["loss"] for r in store.cells().values()] == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert all(json.loads(line) for line in store.path.read_text().splitlines())
    go(todo, store, measure)  # which would raise: there is nothing left


def test_a_refused_conversion_is_not_tried_again(tmp_path: Path) -> None:
    todo = cells(["a"], [0, 1], ["mean", "optimal"], ["4:1"], [0.0, 0.05], ["lm"])
    tried: list[Cell] = []

    def measure(cell: Cell) -> dict[str, Any]:
        if cell.merge == "optimal":
            tried.append(cell)
            raise RefusedError("no")
        return record(cell, 1.0)

    store = Store(tmp_path / "cells.jsonl")
    assert go(todo, store, measure) == {"a optimal 4:1": "no"}
    assert len(tried) == 1
    assert len(store.cells()) == 8
    go(todo, store, measure, deadline=0.0)
    assert len(tried) == 1


def test_evaluation() -> None:
    model, original = tiny_model("llama", "eager"), tiny_model("llama", seed=1)
    tokens = torch.randint(5, 60, (5, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": t, "labels": t} for t in tokens.split(2)]
    found = evaluate(model, original, batches, entropy_rows=1000)
    loss = compute_mean_loss(model, batches, Task.causal_lm, total=3, label="")
    assert found["loss"] == pytest.approx(loss, abs=1e-6)
    with torch.no_grad():
        out = model(input_ids=tokens, output_attentions=True)
        p = out.logits[:, :-1].log_softmax(-1)
        q = original(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    assert found["kl"] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), abs=1e-6)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    a = torch.stack(out.attentions)
    entropy = -(a * a.clamp_min(1e-30).log()).sum(-1).mean()
    assert found["entropy"] == pytest.approx(float(entropy), abs=1e-5)
    itself = evaluate(original, original, batches, entropy_rows=4)
    assert (itself["kl"], itself["agreement"]) == (0.0, 1.0)


def test_a_tiny_grid_from_end_to_end(tmp_path: Path) -> None:
    names = {"results": "r.json", "page": "docs/p.md", "picture": "images/picture.png"}
    out = {name: tmp_path / file for name, file in names.items()}
    command = [
        sys.executable,
        "-m",
        "benchmarks.merge_quality",
        "--quick",
        "--merges",
        "mean",
        "--rates",
        "1",
        "0.5",
        "--store",
        str(tmp_path / "cells.jsonl"),
        "--models",
        str(tmp_path / "models"),
        *(part for name, path in out.items() for part in (f"--{name}", str(path))),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    kept = json.loads(out["results"].read_text())
    assert len(kept["cells"]) == 5 + 6  # a control and mean by two objectives, at two rates
    (run,) = kept["runs"]
    assert run["command"].startswith("python -m benchmarks.merge_quality --quick")
    assert {"machine", "versions"} <= run.keys()
    by_key = {Cell.of(cell).key: cell for cell in kept["cells"]}
    original = by_key["tiny-0 original 1:1 0% none"]
    assert (original["kl"], original["agreement"], original["steps"]) == (0.0, 1.0, 0)
    for cell in kept["cells"]:
        assert cell["kv_heads"] == (8 if cell["merge"] == ORIGINAL else 2)
        assert cell["tokens"] == (2 * 4 * 64 if cell["share"] else 0)
        assert cell is original or cell["kl"] > 0
        assert cell["weights"] == original["weights"]
        assert ("tuning_loss" in cell) is (cell["rate"] is not None)
    # Rates are multiples of the default, which is what this preset heals at; and the cells agree.
    same, usual = by_key["tiny-0 mean 4:1 5% lm at 1"], by_key["tiny-0 mean 4:1 5% lm"]
    assert (same["loss"], same["lr"]) == (usual["loss"], usual["lr"])
    assert by_key["tiny-0 mean 4:1 5% lm at 0.5"]["lr"] == pytest.approx(usual["lr"] / 2)
    assert same["tuning_loss"] != same["loss"]
    mean = find(kept["groups"], "mean", "4:1", 0.0, NO_TRAINING)
    assert mean is not None
    gap = by_key["tiny-0 mean 4:1 0% none"]["loss"] - original["loss"]
    assert mean["kinds"]["tiny"]["gap"] == pytest.approx(gap)
    page = out["page"].read_text()
    assert "| tiny | mean |" in page
    assert page.count("0 of 0 reached") == 2  # the grid's, and those at the best rates
    assert "(../images/picture.png)" in page
    assert out["picture"].read_bytes().startswith(b"\x89PNG")
