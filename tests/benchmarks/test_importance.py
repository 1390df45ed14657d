"""The study of importance: its arithmetic, its sentences, its cuts, and a tiny grid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.importance import sentences
from benchmarks.importance.figures import derive
from benchmarks.importance.grid import ESTIMATORS, ORIGINAL, PRUNE, SCORE, Cell, cells, original
from benchmarks.importance.page import page
from benchmarks.importance.presets import FULL
from benchmarks.importance.ranks import overlap
from benchmarks.importance.work import chosen, cut
from benchmarks.shared.weights import MixedWeightsError
from surgery.models.sites import find_sites
from surgery.models.source import make_byte_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
AMOUNTS = (0.2, 0.4)
# One layer of four heads and one of four; orders, as far as ranks go.
TABLES = {
    "leave_one_out": [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]],
    "gate_gradient": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
    "output_norm": [[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]],
    "random": [[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]],
}
GAPS = {"leave_one_out": 0.1, "gate_gradient": 0.1, "output_norm": 0.8, "random": 0.4}
HEALED = {"leave_one_out": 0.02, "gate_gradient": 0.01, "output_norm": 0.04, "random": 0.04}


def case(
    kind: str = "a",
    gaps: dict[str, float] = GAPS,
    healed: dict[str, float] = HEALED,
    tables: dict[str, Any] = TABLES,
    seed: int = 0,
    weights: str = "w",
) -> list[dict[str, Any]]:
    """Records of one model: a gap at 20%, twice it at 40%, and per layer three times as much."""
    same = {"weights": weights}
    whole = {"loss": 1.0, "removed": 0, "heads": 8, "seconds": {}}
    found = [Cell(kind, "", PRUNE, ORIGINAL, 0).to_json() | same | whole]
    for name, table in tables.items():
        found.append(
            Cell(kind, "heads", SCORE, name, seed).to_json()
            | same
            | {
                "scores": table,
                "standard_errors": [[0.5] * 4] * 2,
                "forward_seconds": 2.0,
                "seconds": {"score": 5.0, "forward": 4.0},
            }
        )
        runs = (
            ("global", False, gaps[name]),
            ("global", True, healed[name]),
            ("layer", False, 3 * gaps[name]),
        )
        for scope, after, gap in runs:
            for times, amount in enumerate(AMOUNTS, 1):
                cell = Cell(kind, "heads", PRUNE, name, seed, scope, amount, after)
                found.append(
                    cell.to_json()
                    | same
                    | {
                        "loss": 1.0 + times * gap,
                        "removed": 2 * times,
                        "heads": 8,
                        "seconds": {"measure": 1.0},
                    }
                )
    return found


def test_agreement_and_cost_of_one_case() -> None:
    (found,) = derive(case())["cases"]
    assert found["units"] == 8
    medians = {
        name: {key: value and value["median"] for key, value in found["agreement"][name].items()}
        for name in ESTIMATORS
    }
    nothing = dict.fromkeys(("all", "within", "top", "low", "again"))
    assert medians["leave_one_out"] == nothing
    assert medians["gate_gradient"] == pytest.approx(
        nothing | {"all": 1.0, "within": 1.0, "top": 1.0, "low": 1.0}
    )
    assert medians["output_norm"] == pytest.approx(
        nothing | {"all": -1.0, "within": -1.0, "top": 0.0, "low": 0.0}
    )
    # Layers in order, reversed inside: 1 - 6 * (2 * (9 + 1 + 1 + 9)) / (8 * 63).
    assert medians["random"]["all"] == pytest.approx(1 - 6 * 40 / (8 * 63))
    assert medians["random"]["within"] == pytest.approx(-1.0)
    assert found["cost"]["random"]["median"] == 2.5
    assert found["noise"]["leave_one_out"]["median"] == pytest.approx(0.5 / 5.25**0.5)


def test_losses_of_one_case() -> None:
    derived = derive(case())
    (found,) = derived["cases"]
    assert found["original"] == 1.0
    curve = found["pruning"]["global"]["output_norm"]
    assert [point["removed"] for point in curve] == [0.25, 0.5]
    assert [point["gap"]["median"] for point in curve] == pytest.approx([0.8, 1.6])
    assert found["mean_gap"]["layer"]["random"] == pytest.approx(1.8)
    assert found["share_of_random"]["global"]["leave_one_out"] == pytest.approx(0.25)
    assert found["left"] == pytest.approx(
        {"leave_one_out": 0.2, "gate_gradient": 0.1, "output_norm": 0.05, "random": 0.1}
    )
    wins = {run: value["estimators"] for run, value in derived["wins"].items()}
    none = dict.fromkeys(ESTIMATORS, 0)
    assert wins["global"] == none | {"leave_one_out": 2, "gate_gradient": 2}  # a tie
    assert wins["healed"] == none | {"gate_gradient": 2}
    assert derived["scopes"]["random"] == {"of": 2, "global_better": 2, "amounts": [0.2, 0.4]}


def test_medians_over_seeds_then_over_cases() -> None:
    other = GAPS | {"leave_one_out": 0.3}
    records = [*case(), *case(gaps=other, seed=1), *case("b", gaps=GAPS | {"leave_one_out": 0.2})]
    derived = derive(records)
    first = derived["cases"][0]
    point = first["pruning"]["global"]["leave_one_out"][0]
    assert point["seeds"] == [0, 1]
    assert point["gap"] == pytest.approx({"median": 0.2, "low": 0.1, "high": 0.3})
    assert first["agreement"]["leave_one_out"]["again"]["median"] == pytest.approx(1.0)
    assert derived["overall"]["leave_one_out"]["global"] == pytest.approx(
        {"median": 0.5, "cases": 2}
    )


def test_what_is_missing_is_no_number() -> None:
    some = ("random", "leave_one_out", ORIGINAL)
    (found,) = derive(r for r in case() if r["estimator"] in some)["cases"]
    assert found["pruning"]["global"]["random"]
    assert found["complete"]["global"] == []
    assert found["share_of_random"]["global"]["leave_one_out"] is None
    assert found["agreement"]["gate_gradient"]["all"] is None
    (found,) = derive(r for r in case() if r["estimator"] != ORIGINAL)["cases"]
    assert found["pruning"]["global"]["random"] == []


def test_cells_of_other_weights_do_not_mix() -> None:
    with pytest.raises(MixedWeightsError, match="cells of a"):
        derive([*case(), *case(seed=1, weights="v")])


def test_overlap() -> None:
    assert overlap([1, 2, 3, 4], [4, 1, 2, 3], 0.5) == 0.5
    assert overlap([1, 2, 3, 4], [4, 1, 2, 3], 0.5, lowest=True) == 0.5
    assert overlap([1, 2, 3, 4], [1, 2, 4, 3], 0.25) == 0.0
    assert overlap([1, 2], [5, 6], 0.25) == 1.0  # one place at least


def test_the_grid_is_whole_and_begins_with_what_matters() -> None:
    found = cells(FULL.units, FULL.estimators, (0, 1), FULL.scopes, FULL.amounts)
    cases = sum(map(len, FULL.units.values()))
    assert len(found) == len({cell.key for cell in found}) == 5 + cases * 4 * 2 * (1 + 6 * 3)
    assert found[:5] == [original(kind) for kind in FULL.kinds]
    assert [Cell.of(cell.to_json()) for cell in found] == found
    phases = [(cell.what == PRUNE, cell.healed) for cell in found[5:]]
    assert phases == sorted(phases)
    assert {cell.scope for cell in found if cell.healed} == {"global"}
    first = next(cell for cell in found if cell.healed)
    assert (first.seed, first.amount) == (0, 0.4)
    untrained = cells(FULL.units, FULL.estimators, [0], ["layer"], [0.5], healed=False)
    assert len(untrained) == 5 + cases * 4 * 2


def said(records: list[dict[str, Any]]) -> str:
    figures = {"preset": FULL.to_json(), **derive(records)}
    parts = [
        *sentences.agreement(figures),
        *sentences.cost(figures),
        *sentences.healing(figures),
        *sentences.losses(figures, "global", "As cut"),
        *sentences.foresight(figures),
        *sentences.scopes(figures),
    ]
    return "\n".join(parts)


def test_sentences_follow_the_figures() -> None:
    text = said(case())
    assert "`gate_gradient` ranks heads most like `leave_one_out`: rank correlation 1.00" in text
    assert "`leave_one_out` 0.25, `gate_gradient` 0.25 and `output_norm` 2.00" in text
    assert "That of `output_norm` is no better than chance." in text
    assert "the choice of `leave_one_out` (2), `gate_gradient` (2), `output_norm` (0)," in text
    assert "after healing than before in 0 of 1 cases" in text  # a quarter, and a quarter
    assert "`output_norm` 2 of 2" in text

    swapped = {
        "gate_gradient": TABLES["output_norm"],
        "output_norm": TABLES["gate_gradient"],
        "leave_one_out": TABLES["leave_one_out"],
        "random": TABLES["random"],
    }
    gaps = {"leave_one_out": 0.2, "gate_gradient": 0.3, "output_norm": 0.1, "random": 0.4}
    text = said(case(gaps=gaps, healed=dict.fromkeys(ESTIMATORS, 0.05), tables=swapped))
    assert "`output_norm` ranks heads most like" in text
    assert "the choice of `output_norm` (2), `leave_one_out` (0)" in text
    assert "no better than chance" not in text
    assert "after healing than before in 1 of 1 cases" in text


@pytest.mark.parametrize(
    ("flip", "says"),
    [(False, "who agrees more prunes better"), (True, "who agrees more prunes worse")],
)
def test_foresight_is_what_the_ranks_say(flip: bool, says: str) -> None:
    worse = {"leave_one_out": 0.1, "gate_gradient": 0.3, "output_norm": 0.2, "random": 0.4}
    gaps = worse if flip else GAPS
    assert says in said([*case("a", gaps), *case("b", gaps)])


def test_layers_that_do_not_compare_are_told_of() -> None:
    assert "do not compare" not in said(case())
    first, second = TABLES["leave_one_out"]
    shifted = [[score + 90 for score in first], second]
    text = said(case(tables=TABLES | {"output_norm": shifted}))
    assert "Within a layer `output_norm` comes to 1.00, over all layers to -0.52" in text


def test_half_a_grid_has_a_page() -> None:
    records = [r for r in case() if not r["healed"] and r["estimator"] != "output_norm"]
    kept = {"preset": json.loads(json.dumps(FULL.to_json())), "runs": [], "cells": records}
    text = page({**kept, **derive(records)}, Path("docs/p.md"), Path("p.png"), Path("q.png"))
    assert "| leave_one_out | **0.1000** | **0.2000** |" in text
    assert "| random | 0.4000 | 0.8000 |" in text
    assert "Not measured yet: `embedded`, `qwen3`" in text
    assert "is no better than chance" not in text  # without all estimators, no comparison
    assert "After 26 steps" not in text


def test_groups_go_whole_and_queries_one_of_each(tmp_path: Path) -> None:
    model = tiny_model("llama")  # 2 layers of 4 heads, 2 KV heads
    table = {
        "scores": [[3.0, 1.0, 2.0, 4.0], [9.0, 9.0, 9.0, 9.0]],
        "group_scores": [[1.0, 2.0], [0.5, 9.0]],
    }
    file = tmp_path / "t.json"
    file.write_text(json.dumps(table))
    sites = find_sites(model).sites
    groups = Cell("a", "groups", PRUNE, "random", 0, "global", 0.5)
    assert chosen(sites, groups, file) == {0: [0, 1], 1: [0, 1]}
    assert chosen(sites, replace(groups, unit="heads", amount=0.25), file) == {0: [1, 2]}
    pruned = cut(model, {0: [1, 2]})
    assert [(s.q_heads, s.kv_heads) for s in find_sites(pruned).sites] == [(2, 2), (4, 2)]
    assert [s.q_heads for s in find_sites(model).sites] == [4, 4]


def test_a_tiny_grid_from_end_to_end(tmp_path: Path) -> None:
    exported = tmp_path / "models" / "tiny-0" / "export"
    tokenizer = make_byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(exported)
    tokenizer.save_pretrained(exported)
    names = {
        "results": "r.json",
        "page": "docs/p.md",
        "picture": "images/picture.png",
        "second_picture": "images/second.png",
    }
    out = {name: tmp_path / file for name, file in names.items()}
    chosen_ones = ("leave_one_out", "random")
    command = [
        sys.executable,
        "-m",
        "benchmarks.importance",
        "--quick",
        "--kinds",
        "tiny",
        "--estimators",
        *chosen_ones,
        "--store",
        str(tmp_path / "cells.jsonl"),
        "--models",
        str(tmp_path / "models"),
        *(part for name, path in out.items() for part in (f"--{name}", str(path))),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    kept = json.loads(out["results"].read_text())
    by_key = {Cell.of(cell).key: cell for cell in kept["cells"]}
    assert len(by_key) == len(kept["cells"]) == 1 + 2 + 2 + 2
    (run,) = kept["runs"]
    assert run["command"] == (
        "python -m benchmarks.importance --quick --kinds tiny --estimators leave_one_out random"
    )
    assert {"machine", "versions"} <= run.keys()
    whole = by_key["tiny prune original-0"]
    assert (whole["kl"], whole["removed"]) == (0.0, 0)
    for name in chosen_ones:
        pruned = by_key[f"tiny heads prune {name}-0 global 40% as cut"]
        scores = by_key[f"tiny heads score {name}-0"]["scores"]
        flat = sorted((s, layer, h) for layer, row in enumerate(scores) for h, s in enumerate(row))
        lowest = {f"{layer}/{head}" for _, layer, head in flat[:6]}
        gone = {f"{layer}/{h}" for layer, row in pruned["removed_heads"].items() for h in row}
        assert gone == lowest
        assert pruned["kl"] > 0
        healed = by_key[f"tiny heads prune {name}-0 global 40% healed"]
        assert healed["removed_heads"] == pruned["removed_heads"]
        assert (healed["steps"], pruned["steps"]) == (2, 0)
        assert healed["loss"] != pruned["loss"]
    text = out["page"].read_text()
    assert "| tiny, query heads | random |" in text
    assert "(../images/picture.png)" in text
    for name in ("picture", "second_picture"):
        assert out[name].read_bytes().startswith(b"\x89PNG")
