"""What watching costs: what is compared and drawn, on a tiny model; not how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.observe.__main__ import run
from benchmarks.observe.explicit import NAMES, statistics
from benchmarks.observe.measure import at_default, middle, spread
from benchmarks.observe.page import page
from benchmarks.observe.picture import draw
from benchmarks.observe.subject import PRESETS, batch, build
from benchmarks.observe.targets import RESOLUTION, growth, judged
from benchmarks.observe.variants import ALL, EXPLICIT, PICTURED, PLAIN, VARIANTS, WATCHED
from surgery.lab.report.summary import describe_machine, find_versions
from surgery.observe import AttentionCall, Tap
from surgery.observe.statistics import compute_head_statistics

QUICK = PRESETS["quick"]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Fresh processes cost imports alone at this size.
        patch.setattr("benchmarks.observe.__main__.fresh", lambda f, *given: f(*given))
        patch.setenv("OBSERVE_LENS_PYTHON", "/bin/false")
        patch.setenv("WANDB_SILENT", "true")
        return run(QUICK)


def test_both_ways_find_the_same() -> None:
    """The explicit map's statistics are those of the tap with all rows."""
    length = 40
    rows = batch(length)
    found: list[torch.Tensor] = []

    def see(call: AttentionCall) -> None:
        sums = compute_head_statistics(call, torch.arange(length), NAMES)
        found.append(torch.stack([total / count for total, count in sums.values()]).float())

    model = build(QUICK, length, "sdpa")
    with torch.no_grad():
        with Tap(model, see) as tap:
            tap.open(tokens=rows["input_ids"])
            model(**rows)
        model.set_attn_implementation("eager")
        maps = model(**rows, output_attentions=True).attentions
    for mine, whole in zip(found, maps, strict=True):
        explicit = statistics(whole, rows["input_ids"])
        assert explicit.isfinite().all()
        torch.testing.assert_close(explicit, mine, rtol=1e-4, atol=1e-5)


def test_all_lengths_and_variants_are_measured(figures: dict[str, Any]) -> None:
    assert list(figures["lengths"]) == ["64"]
    for length, cell in figures["lengths"].items():
        assert set(cell["time"]) == set(cell["memory"]) == set(VARIANTS)
        for one in cell["time"].values():
            assert len(one["all"]) == QUICK.rounds_of(int(length))
        assert cell["time"][PLAIN]["ratio"] == 1
        assert cell["default"]["derived"] == at_default(cell["time"])
        assert all(0 < m["before_bytes"] <= m["peak_bytes"] for m in cell["memory"].values())
    assert len(figures["lengths"]["64"]["default"]["direct"]["pairs"]) == QUICK.blocks
    assert figures["lens"]["version"] is None
    assert figures["lens"]["absent"]


def test_ratios_are_of_the_same_round() -> None:
    wall = {PLAIN: [1.0, 2.0, 4.0], WATCHED: [2.0, 2.0, 4.4]}
    found = spread(wall, {PLAIN: [1.0, 1.0, 1.0], WATCHED: [1.5, 9.0, 1.0]})
    assert found[WATCHED]["ratio"] == pytest.approx(1.1)
    assert found[WATCHED]["ratio_range"] == [1.0, 2.0]
    assert found[WATCHED]["cpu_ratio"] == 1.5
    time = {WATCHED: {"ratio": 1.1}, PICTURED: {"ratio": 1.3}}
    assert at_default(time) == pytest.approx(0.1 / 25 + 0.2 / 100)


def _made(watched: float, share: float, rate: float, explicit: float = 3.0) -> dict[str, Any]:
    """Figures of 1024, 2048 and 4096 tokens: memory grows as length^rate."""
    cells = {}
    for length in (1024, 2048, 4096):
        extra = {WATCHED: 2 * RESOLUTION * (length / 1024) ** rate, EXPLICIT: 16.0 * length**2 * 8}
        ratios = {WATCHED: watched, EXPLICIT: explicit}
        memory = {
            name: {"peak_bytes": 10**9 + extra.get(name, 0), "before_bytes": 10**9}
            for name in VARIANTS
        }
        cells[str(length)] = {
            "time": {
                name: {
                    "ratio": ratios.get(name, 1.0),
                    "ratio_range": [1, 2],
                    "all": [1],
                    "seconds": 1.0,
                }
                for name in VARIANTS
            },
            "default": {"derived": share},
            "memory": memory,
            "lens": None,
        }
    return {"rows": 64, "lengths": cells}


@pytest.mark.parametrize(
    ("made", "reached"),
    [
        (_made(1.05, 0.01, 1), [True, True, True, True, True]),
        (_made(1.05, 0.03, 1), [False, True, True, True, True]),
        (_made(1.2, 0.01, 1), [True, False, True, True, True]),
        (_made(1.05, 0.01, 2), [True, True, False, True, True]),
        (_made(1.05, 0.01, 4), [True, True, False, False, True]),
        (_made(1.05, 0.01, 1, explicit=1.2), [True, True, True, True, False]),
    ],
)
def test_targets_are_judged(made: dict[str, Any], reached: list[bool]) -> None:
    assert [one["reached"] for one in judged(made)] == reached


def test_memory_is_that_of_the_middling_process() -> None:
    found = [{"peak_bytes": peak, "before_bytes": 10} for peak in (90, 30, 40)]
    assert middle(found) == {"peak_bytes": 40, "before_bytes": 10, "all_bytes": [20, 30, 80]}


def test_growth_needs_two_lengths() -> None:
    cells = _made(1.0, 0.0, 2)["lengths"]
    assert growth(cells, WATCHED) == pytest.approx(4)
    assert growth(cells, ALL) == 1  # both below what can be told
    assert growth({"4096": cells["4096"]}, WATCHED) is None


def test_page_and_picture_say_what_was_measured(figures: dict[str, Any], tmp_path: Path) -> None:
    whole = {"command": "c", **figures, "machine": describe_machine(), "versions": find_versions()}
    text = page(whole)
    cell = figures["lengths"]["64"]
    assert f"| {cell['default']['derived']:+.2%} |" in text
    assert f"{cell['time'][EXPLICIT]['ratio']:.2f} (" in text
    assert "TransformerLens was not measured" in text
    assert "not measured |" in text  # nothing here is 2048 tokens long
    draw(whole, tmp_path / "observe.png")
    with Image.open(tmp_path / "observe.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
