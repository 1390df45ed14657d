"""The benchmark on a real model: its rows compose, it resumes, and its page is what JSON gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import surgery.hydra  # noqa: F401
from benchmarks.real.__main__ import main, write_docs
from benchmarks.real.page import merge_parts
from benchmarks.real.perform import Places, run_here
from benchmarks.real.read import read_healing
from benchmarks.real.results import collect
from benchmarks.real.rows import ORIGINAL, list_rows
from benchmarks.real.schedule import choose, find_todo, go
from benchmarks.real.sizes import FULL, QUICK
from benchmarks.real.store import Records
from benchmarks.real.subject import Subject, find_subject
from benchmarks.real.targets import list_targets
from benchmarks.results_file import FOLDER
from surgery.config.validate import check_config
from surgery.plan.registry import parse_operations

ROOT = Path(__file__).parents[2]
THREE = (ORIGINAL, "scores-random", "prune-random-10")
RESULTS = sorted(FOLDER.glob("real-*.json"))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return find_subject("embedded", None)


def make_records(subject: Subject, folder: Path, **changes: Any) -> Records:
    rows = {row.name: row for row in list_rows(subject, QUICK)}
    rows |= {name: replace(rows[name], **change) for name, change in changes.items()}
    return Records(rows, folder / "rows", Places(subject, folder / "runs"))


def never(words: Sequence[str], log: Path) -> int:
    raise AssertionError(f"{words} ran")


def test_every_kind_of_row_is_a_configuration_of_its_own(subject: Subject, tmp_path: Path) -> None:
    places = Places(subject, tmp_path)
    seen = set()
    for row in list_rows(subject, FULL):
        for words in row.commands:
            choices = [word for word in words if word.startswith(("attention=", "objective="))]
            kind = (row.section, *choices)
            if words[0] != "train.py" or kind in seen:
                continue
            seen.add(kind)
            overrides = places.fill(words[1:], row, 3, tmp_path / "need")
            GlobalHydra.instance().clear()
            with initialize_config_module("surgery.conf", version_base="1.3"):
                cfg = compose("config", overrides=[*overrides, "run_dir=somewhere"])
            run = check_config(cfg)
            parse_operations(run.attention)
            assert run.seed == 3
    assert len(seen) > 10


def test_rows_come_after_what_they_need(subject: Subject, tmp_path: Path) -> None:
    records = make_records(subject, tmp_path)
    tasks = choose(records, None, 3)
    assert len(tasks) == len(set(tasks))
    for number, (name, seed) in enumerate(tasks):
        for need in records.rows[name].needs:
            assert (need, records.find_seed(need, seed)) in tasks[:number]
    first = [seed for _, seed in tasks]
    assert first == sorted(first)  # all rows with the first seed, then with the second
    assert choose(records, ["prune-random-10"], 2) == [
        (name, seed) for seed in (0, 1) for name in ("scores-random", "prune-random-10")
    ]


def test_three_rows_are_interrupted_resumed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, folder = tmp_path / "results.json", tmp_path / "home"
    command = ["--model=embedded", "--quick", "--in-process", "--seeds=1"]
    command += [f"--folder={folder}", f"--results={results}", "--only", ORIGINAL, THREE[-1]]

    def stop_at_scores(words: Sequence[str], log: Path) -> int:
        if "stages=[plan,score]" in words:
            raise KeyboardInterrupt
        return run_here(words, log)

    monkeypatch.setattr("benchmarks.real.__main__.run_here", stop_at_scores)
    assert main(command) == 130
    assert [path.stem for path in (folder / "rows").iterdir()] == [f"{ORIGINAL}-0"]
    first = (folder / f"rows/{ORIGINAL}-0.json").read_bytes()

    monkeypatch.setattr("benchmarks.real.__main__.run_here", run_here)
    assert main(command) == 0
    assert (folder / f"rows/{ORIGINAL}-0.json").read_bytes() == first
    monkeypatch.setattr("benchmarks.real.__main__.run_here", never)
    assert main(command) == 0
    assert main([*command, "--list"]) == 0

    found = json.loads(results.read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(found)
    rows = {row["name"]: row for row in found["rows"]}
    done = {name for name, row in rows.items() if row["records"]}
    assert done == set(THREE)
    cut, original = (rows[name]["records"][0]["figures"] for name in (THREE[-1], ORIGINAL))
    assert cut["parameters"] < original["parameters"]
    assert cut["loss"] > original["loss"]
    (costs,) = (record["costs"] for record in rows["scores-random"]["records"])
    assert next(cost["process"] for cost in costs if cost["stage"] == "score") > 0
    # Nobody needs this cut, so its weights are gone; the scores are still there.
    assert not list((folder / "runs/prune-random-10-0").rglob("*.safetensors"))
    assert (folder / "runs/scores-random-0/score/importance.json").is_file()

    assert main(["--page", f"--results={results}", f"--docs={tmp_path / 'docs'}"]) == 0
    page = (tmp_path / "docs/benchmarks/real.md").read_text(encoding="utf-8")
    rise = cut["loss"] / original["loss"] - 1
    assert f"| random | no | {rise:+.1%} | not run | not run | 1 |" in page
    assert f"The original's is {original['loss']:.4f} nats per token" in page
    assert (tmp_path / "docs/images/real_pruning.png").is_file()
    assert not (tmp_path / "docs/images/real_rope.png").exists()


def test_a_failed_row_is_recorded_and_the_rest_goes_on(subject: Subject, tmp_path: Path) -> None:
    options = ("attention=[gqa]", "attention.gqa.kv_heads=3", "stages=[plan]", "logger=none")
    bad = ("train.py", *options, "hydra.run.dir=<run>/score")
    records = make_records(subject, tmp_path, **{"scores-random": {"commands": (bad,)}})
    last = ("-m", "benchmarks.absent")
    rows = dict(records.rows) | {ORIGINAL: replace(records.rows[ORIGINAL], commands=(last,))}
    records = Records(rows, records.folder, records.places)
    todo = [("scores-random", 0), ("prune-random-10", 0), (ORIGINAL, 0)]
    outcome = go(records, todo, run_here)
    assert list(outcome.failed) == [("scores-random", 0), (ORIGINAL, 0)]
    assert "attention.gqa.kv_heads: does not divide the 8 KV heads" in outcome.failed[todo[0]]
    assert "No module named benchmarks.absent" in outcome.failed[todo[2]]
    assert outcome.blocked == {("prune-random-10", 0): "needs scores-random, which failed"}
    assert find_todo(records, todo) == todo  # what failed is tried again
    found = {row["name"]: row["records"] for row in collect(records, QUICK, "c")["rows"]}
    assert found["scores-random"][0]["status"] == "failed"
    assert not found["prune-random-10"]
    assert str(tmp_path) not in json.dumps(found)


def write_done(records: Records, name: str, seed: int = 0, **figures: Any) -> None:
    record = {"row": name, "seed": seed, "status": "done", "error": None, "figures": figures}
    machine = {"machine": {"cpu": "c"}, "versions": {"torch": "t"}, "date": "d"}
    records.write(record | machine | {"costs": [], "wall_seconds": 100.0})


def test_a_row_is_done_again_where_what_it_depends_on_has_changed(
    subject: Subject, tmp_path: Path
) -> None:
    records = make_records(subject, tmp_path)
    tasks = [(name, 0) for name in THREE]
    for name in THREE:
        write_done(records, name, loss=1.0)
    # The score table that is needed is gone, but nobody needs it any more.
    assert find_todo(records, tasks) == []
    assert find_todo(records, tasks, [tasks[2]]) == tasks[1:]
    other = make_records(replace(subject, weights="other"), tmp_path)
    assert find_todo(other, tasks) == tasks
    scores = records.rows["scores-random"]
    longer = (*scores.commands[0], "importance.windows=3")
    changed = make_records(subject, tmp_path, **{"scores-random": {"commands": (longer,)}})
    assert find_todo(changed, tasks) == tasks[1:]  # and so is what was made from it


def test_results_that_were_kept_stay_where_nothing_was_run_again(
    subject: Subject, tmp_path: Path
) -> None:
    records = make_records(subject, tmp_path / "one")
    for name in THREE:
        write_done(records, name, loss=1.0)
    first = collect(records, QUICK, "c")
    elsewhere = make_records(subject, tmp_path / "two")
    write_done(elsewhere, ORIGINAL, loss=2.0)
    found = {row["name"]: row for row in collect(elsewhere, QUICK, "c", first)["rows"]}
    assert found[ORIGINAL]["records"][0]["figures"] == {"loss": 2.0}
    assert found[THREE[1]]["records"] == first["rows"][names(first).index(THREE[1])]["records"]
    other = make_records(replace(subject, weights="other"), tmp_path / "three")
    assert not any(row["records"] for row in collect(other, QUICK, "c", first)["rows"])


def names(figures: dict[str, Any]) -> list[str]:
    return [row["name"] for row in figures["rows"]]


def test_no_row_starts_that_would_not_end_in_time(subject: Subject, tmp_path: Path) -> None:
    records = make_records(subject, tmp_path)
    todo = [(ORIGINAL, 0), ("scores-random", 0)]
    outcome = go(records, todo, never, minutes=0.01)
    assert outcome.out_of_time
    assert outcome.left == todo
    write_done(records, ORIGINAL, loss=1.0)  # took 100 s: as long as it will take again
    assert go(records, todo[:1], never, minutes=1.6).left == todo[:1]


def test_targets_are_medians_against_the_original() -> None:
    def row(*losses: float, **more: float) -> dict[str, Any]:
        figures = [{"loss": loss, **more} for loss in losses]
        return {"records": [{"status": "done", "figures": f, "costs": []} for f in figures]}

    rows = {
        ORIGINAL: row(2.0),
        "gqa-mean": row(12.0),
        "gqa-optimal-64x512": row(2.5, 2.7, 9.0),
        "gqa-average-2": row(2.1),
        "prune-leave_one_out-20-refit": row(2.06),
        "heal-gqa-average-2": row(2.07, loss_before=2.1),
        "rate-10": row(2.8, loss_before=2.7),
    }
    found = {target["name"]: target for target in list_targets(rows, FULL)}
    assert found["merge-many"]["value"] == pytest.approx(0.07)  # 0.7 of 10
    assert found["merge-many"]["reached"] is False
    assert found["merge-average"]["value"] == pytest.approx(0.1 / 0.7)
    assert found["merge-average"]["reached"] is True
    assert found["prune-20"]["value"] == pytest.approx(0.03)
    assert found["prune-20"]["reached"] is True
    assert found["heal-average"]["value"] == pytest.approx(0.035)
    assert found["heal-average"]["reached"] is False
    assert found["no-worse"]["value"] == pytest.approx(0.1)
    assert found["no-worse"]["reached"] is False
    assert found["merge-few"]["value"] is found["merge-few"]["reached"] is None


def test_parts_of_a_window_are_merged_in_pairs() -> None:
    parts = [(0, 1, 1.0), (2, 3, 3.0), (4, 5, 5.0), (6, 7, None)]
    assert merge_parts(parts, 2) == [(0, 3, 2.0), (4, 7, None)]
    assert merge_parts(parts, 4) == parts
    assert merge_parts(None, 4) == []


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_the_page_is_what_the_results_give(results: Path, tmp_path: Path) -> None:
    write_docs(results, tmp_path)
    page = (tmp_path / "benchmarks/real.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs/benchmarks/real.md").read_text(encoding="utf-8")
    for picture in (tmp_path / "images").glob("*"):
        assert (ROOT / "docs/images" / picture.name).is_file()
    assert str(ROOT.parent) not in page


def test_mistakes_get_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model=embedded", "--only", "nothing"]) == 2
    assert "error: --only: there is no such row" in capsys.readouterr().err
    assert main(["--page", "--results=absent.json"]) == 2
    assert "error: --results: there is no such file" in capsys.readouterr().err
    assert main(["--model=/absent/model"]) == 2
    assert "error: model.path" in capsys.readouterr().err


@pytest.mark.parametrize(("reverted", "step"), [(None, 20), ({"step": 20}, 0)])
def test_healing_that_was_given_up_has_kept_step_0(
    reverted: dict[str, Any] | None, step: int, tmp_path: Path
) -> None:
    held_out = {"losses": [[0, 2.0], [20, 1.9]], "kept_step": 20, "last_loss": 1.9}
    training = {"tokens": 1, "steps": 20, "lr": 1e-3, "held_out": held_out, "reverted": reverted}
    measured = {"loss": 2.0}
    summary = {"training": training, "before": measured, "after_training": measured}
    (tmp_path / "heal").mkdir()
    (tmp_path / "heal/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert read_healing(tmp_path)["kept_step"] == step
