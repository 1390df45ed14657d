"""Comparing runs: the command, what it finds, and the page it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from surgery.lab.report.compare import compare_runs, find_runs, main
from surgery.lab.report.html import write_report
from surgery.lab.report.html.comparison import find_differences, name_runs, select_main
from surgery.lab.report.html.data import read_run
from tests.lab.report.making import summary, write_run
from tests.lab.report.test_page import NASTY
from tests.lab.report.viewing import Viewer

# KV heads, loss after healing: the third is worse than the second in both.
RUNS = [(1, 1.5), (2, 1.2), (4, 1.3), (8, 1.0)]


def sweep(folder: Path, **changes: Any) -> Path:
    for number, (kv, loss) in enumerate(RUNS):
        run = folder / str(number)
        config = (
            f"seed: 0\nrun_dir: {run.resolve()}\nattention:\n  gqa:\n    kv_heads: {kv}\n"
            f"data:\n  cache: {run.resolve()}/cache\n"
        )
        write_run(run, config, loss=loss, kv=1024 * kv, **changes)
    return folder


def test_a_sweep_differs_in_what_was_swept(tmp_path: Path) -> None:
    """And not in where its runs lie."""
    runs = [read_run(place) for place in find_runs([sweep(tmp_path)])]
    assert find_differences(runs) == {"attention.gqa.kv_heads": [1, 2, 4, 8]}
    assert name_runs(runs) == ["0", "1", "2", "3"]


def test_operations_and_missing_keys_are_differences(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", "attention:\n  gqa:\n    merge: mean\nseed: 1\n")
    other = write_run(
        tmp_path / "other", "seed: 1\n", operations=[{"operation": "prune_heads", "amount": 0.4}]
    )
    found = find_differences([read_run(one), read_run(other)])
    assert found == {
        "attention.gqa.merge": ["mean", None],
        "operations": ["gqa", "prune_heads"],
    }
    assert next(iter(select_main(found))) == "operations"


def test_runs_are_found_in_hydras_order(tmp_path: Path) -> None:
    for name in ("10", "9", "b", "a/inner"):
        write_run(tmp_path / name)
    write_run(tmp_path / "9" / "tasks" / "code")  # belongs to run 9
    found = find_runs([tmp_path, tmp_path / "b"])
    names = [place.relative_to(tmp_path.resolve()).as_posix() for place in found]
    assert names == ["9", "10", "a/inner", "b"]


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{")
    other = write_run(tmp_path / "other", **{"format": 99})
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "nowhere"], "is not a directory"),
        ([empty], "holds no run"),
        ([broken], "cannot be read"),
        ([other], "format 99"),
        ([run, "--out", tmp_path], "is a directory"),
        ([run, "--out", tmp_path / "no" / "x.html"], "is in no directory"),
        ([], "RUN_DIR"),
    ]
    for arguments, said in cases:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        told = capsys.readouterr()
        assert said in told.err
        assert "Traceback" not in told.err


def test_the_command_runs(tmp_path: Path) -> None:
    sweep(tmp_path / "multirun")
    done = subprocess.run(
        [sys.executable, "-m", "surgery.lab.report", "multirun"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 runs compared in compare.html\n"
    assert (tmp_path / "compare.html").is_file()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sweep(tmp_path_factory.mktemp("sweep & more"))
    write_report(folder / "2")
    compare_runs([folder], folder / "compare.html")
    return folder / "compare.html"


def test_runs_can_be_sorted(viewer: Viewer, comparison: Path) -> None:
    viewer.open(comparison)
    order = "#runs tbody th"
    assert viewer.texts(order) == ["0", "1", "2", "3"]
    head = {text: place for place, text in enumerate(viewer.texts("#runs thead th"))}
    button = viewer.all("#runs thead button")[head["after healing"]]
    viewer.focus(button)
    viewer.press(Keys.ENTER)
    by_loss = ["3", "1", "2", "0"]
    assert viewer.texts(order) == by_loss
    sort = "return document.querySelectorAll('#runs thead th')[arguments[0]].ariaSort"
    assert viewer.run(sort, head["after healing"]) == "ascending"
    viewer.press(Keys.ENTER)
    assert viewer.texts(order) == by_loss[::-1]
    viewer.all("#runs thead button")[head["KV cache per token"]].click()
    assert viewer.texts(order) == ["0", "1", "2", "3"]
    assert viewer.run(sort, head["after healing"]) is None


def test_the_picture_shows_what_no_other_run_beats(viewer: Viewer, comparison: Path) -> None:
    viewer.open(comparison)
    assert viewer.texts(".point") == ["0", "1", "2", "3"]
    assert viewer.texts(".point.best") == ["0", "1", "3"]
    # Less loss is further up or down all the way: heights are in the order of the losses.
    heights = [point.rect["y"] for point in viewer.all(".point")]
    losses = [loss for _, loss in RUNS]
    assert sorted(range(4), key=lambda i: -heights[i]) == sorted(range(4), key=lambda i: losses[i])
    viewer.focus(viewer.all(".point")[1])
    for said in ("kv_heads=2", "loss 1.2", "2 KiB"):
        assert said in viewer.tip
    lit = "return [...document.querySelectorAll('.lit')].map((e) => e.dataset.run)"
    assert set(viewer.run(lit)) == {"1"}


def test_curves_lie_over_each_other(viewer: Viewer, comparison: Path) -> None:
    viewer.open(comparison)
    assert len(viewer.all("[data-draw=curves] path.line[data-run]")) == 4
    assert viewer.texts("#curves .legend li")[1] == "1: kv_heads=2"


def test_reports_are_linked(viewer: Viewer, comparison: Path) -> None:
    viewer.open(comparison)
    (link,) = viewer.all("#runs tbody a")
    link.click()
    assert viewer.run("return location.pathname").endswith("/2/report.html")
    assert viewer.find("h1").text == "tiny"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone(viewer: Viewer, comparison: Path, dark: bool) -> None:
    viewer.open(comparison, width=360, dark=dark)
    assert viewer.run("return document.documentElement.scrollWidth") == 360


def test_names_cannot_break_it(viewer: Viewer, tmp_path: Path) -> None:
    model = summary()["model"] | {"name": NASTY}
    config = f"attention:\n  a: {NASTY.replace(':', '')!r}\n"
    write_run(tmp_path / "</script><b>one", config.replace("\\'", "''"), model=model)
    write_run(tmp_path / "two", "attention:\n  a: x\n", loss=1.1)
    compare_runs([tmp_path], tmp_path / "compare.html")
    viewer.open(tmp_path / "compare.html")
    assert "</script><b>one" in " ".join(viewer.texts("#runs tbody th"))
    assert viewer.run("return window.hacked") is None
    assert viewer.all("#runs b") == []
