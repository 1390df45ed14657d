"""The cells of `benchmarks.own_samples`: configs that are valid, and texts that share nothing."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from benchmarks.own_samples import CHANGES, TEXTS, _make_overrides, _make_parser, write_texts
from surgery.config.validate import check_config
from surgery.data.sources import check_source


def test_every_cell_is_a_valid_run_on_the_same_held_out_text(tmp_path: Path) -> None:
    for name, count in (("real", 60), ("other", 20)):
        lines = [json.dumps({"text": f"{name} text {number}"}) + "\n" for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    given = [f"--real={tmp_path / 'real.jsonl'}", f"--other={tmp_path / 'other.jsonl'}"]
    options = _make_parser().parse_args([*given, "--lr=1e-4"])
    (tmp_path / "texts").mkdir()
    files = write_texts(options, tmp_path / "texts")
    kinds = {name: set(Path(path).read_text().splitlines()) for name, path in files.items()}
    assert len(kinds["real"]) + len(kinds["held_out"]) == 60
    assert kinds["held_out"]
    assert not kinds["held_out"] & (kinds["real"] | kinds["other"])
    GlobalHydra.instance().clear()
    held_out = set()
    with initialize_config_module("surgery.conf", version_base="1.3"):
        for change in CHANGES:
            for text in TEXTS:
                overrides = _make_overrides(options, change, text, files)
                run = check_config(compose("config", overrides=[*overrides, "run_dir=x"]))
                check_source(run.data)
                assert (run.data.kind.value == "self") is (text == "self")
                held_out.add(run.data.val_path)
    assert held_out == {files["held_out"]}
