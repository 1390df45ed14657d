"""A run in the directory of another one: what is old is removed, replaced, or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from surgery.files import write_json, write_picture, write_whole
from tests.lab.dashboard.reading import QUICK, model_and_text


def test_another_run_in_its_directory(cli: Callable[..., Any], tmp_path: Path) -> None:
    own = (*model_and_text(tmp_path), *QUICK, "logger=none", f"hydra.run.dir={tmp_path / 'run'}")
    run_dir = tmp_path / "run"
    gqa = ("attention=[gqa]", "attention.gqa.kv_heads=2")
    first = cli(*own, *gqa, "stages=[plan,measure,operate,export,report]")
    assert first.code == 0, first.err
    assert "of an earlier run" not in first.out
    weights = (run_dir / "export/model.safetensors").read_bytes()
    # As if it had been killed while it wrote these.
    drafts = ["summary.json.partial", "plan.safetensors.partial", "importance-code.png.partial"]
    drafts.append("heads-2.parquet.partial")
    for name in (*drafts, "mine.partial"):
        (run_dir / name).write_text("half")
    for folder in ("export.partial", "export.old.partial", "checkpoints"):
        (run_dir / folder).mkdir()
        (run_dir / folder / "x.ckpt.partial").write_text("half")
    for name in ("best.safetensors", "importance-code.json", "heads-2.parquet"):
        (run_dir / name).write_text("whole")
    second = cli(*own, "stages=[plan]", "attention=[]")
    assert second.code == 0, second.err
    said = "of an earlier run, until this one writes its own: export, checkpoints, best.safetensors"
    assert f"{said}, importance-code.json, heads-2.parquet" in second.out
    assert json.loads((run_dir / "summary.json").read_text())["operations"] == []
    left = {path.name for path in run_dir.rglob("*.partial")}
    assert left == {"mine.partial"}  # somebody else's
    assert not (run_dir / "report.html").exists()
    assert not (run_dir / "result.png").exists()
    assert (run_dir / "export/model.safetensors").read_bytes() == weights
    third = cli(*own, "attention=[gqa]", "attention.gqa.kv_heads=1", "stages=[plan,operate,export]")
    assert third.code == 0, third.err
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert model.config.num_key_value_heads == 1
    again = cli(*own, "attention=[gqa]", "attention.gqa.kv_heads=3")
    assert again.code == 2  # refused before anything is touched
    assert json.loads((run_dir / "summary.json").read_text())["operations"][0]["kv_heads"] == 1


def write_half(path: Path) -> None:
    with write_whole(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, [float("nan")])
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert json.loads(path.read_text()) == [1]
    write_picture(tmp_path / "b.png", Figure())
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert {one.name for one in tmp_path.iterdir()} == {"a.json", "b.png"}
