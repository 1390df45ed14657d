"""The ladder's benchmark on a tiny model: what it keeps and draws, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ladder.__main__ import main
from benchmarks.ladder.models import FUSED, PUBLISHED
from benchmarks.ladder.render import render

RUNGS = ["baseline", "fast", "gqa", "fused_phi3", "fused_live"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    out = str(folder / "ladder-tiny.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    try:
        main(["--preset", "tiny", "--rounds", "2", "--out", out])
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "ladder-tiny.json").read_text())
    return loaded


def test_every_cell_has_every_rung(figures: dict[str, Any]) -> None:
    assert list(figures["results"]) == ["forward", "train", "decode"]
    for cells in figures["results"].values():
        assert list(cells) == ["32", "64"]
        for cell in cells.values():
            assert list(cell) == RUNGS
            for rung in cell.values():
                assert len(rung["rounds"]) == 2
                assert 0 < rung["min"] <= rung["median"] <= rung["max"]
                assert rung["speedup"]["min"] <= rung["speedup"]["median"]
            assert cell["baseline"]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_it_says_what_was_measured(figures: dict[str, Any]) -> None:
    assert figures["preset"]["heads"] == 8
    assert figures["preset"]["head_dim"] == 8
    assert figures["backends"]["baseline"] == "eager"
    assert figures["backends"]["fast"] == "sdpa"
    assert figures["classes"]["fused_phi3"] == "Phi3ForCausalLM"
    assert figures["published"] == PUBLISHED
    assert figures["fused"] in FUSED
    assert figures["machine"]["threads"] >= 1
    assert all(error < 1e-4 for error in figures["logits_differ"].values())


def test_fewer_kv_heads_read_fewer_bytes(figures: dict[str, Any]) -> None:
    cell = figures["results"]["decode"]["64"]
    assert cell["gqa"]["bound_ms"] < cell["fast"]["bound_ms"] == cell["baseline"]["bound_ms"]


def test_the_page_and_the_picture_are_drawn(folder: Path, figures: dict[str, Any]) -> None:
    # A baseline that did not fit leaves a gap, as on a GPU.
    figures["results"]["forward"]["64"]["baseline"] = {"failed": "out of memory"}
    del figures["results"]["forward"]["64"]["fast"]["speedup"]
    (folder / "ladder-gap.json").write_text(json.dumps(figures))
    page, picture = folder / "ladder.md", folder / "images" / "ladder.png"
    render(folder, page, picture)
    assert "| 64 | out of memory |" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
