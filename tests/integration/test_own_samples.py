"""`data=self` in whole runs: what is said of it, and text that a model does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.plan.store import load_plan
from tests.integration.summaries import read_summary

SMALL = (
    "data.seq_len=32",
    "data.batch_size=4",
    "measure.windows=8",
    "measure.prefill_tokens=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "calibration.windows=8",
    "calibration.batch_size=4",
    "calibration.refine_steps=1",
    "calibration.joint_steps=2",
    "calibration.rows=8",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.max_steps=1",
)
OWN = ("data=self", "data.self.windows=12", "data.self.batch_size=12")
SAMPLES = (
    "samples of the original: 12 windows of 32 tokens, temperature 1, first 4 tokens greedy, "
    "prompts vocabulary, seed 0"
)


def test_a_run_on_samples_says_so_everywhere(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli("+recipe=gqa_optimal", *SMALL, *OWN, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert f"data: {SAMPLES}" in outcome.out
    assert "on samples of the original" in outcome.out
    assert "importance.windows" not in outcome.out
    assert "measure.windows=8: the held-out text has 2, and these are used" in outcome.out
    summary = read_summary(tmp_path)
    assert summary["data"]["name"] == summary["training"]["data"] == SAMPLES
    assert summary["data"]["own_samples_held_out"]
    assert summary["data"]["warning"] is None
    assert summary["timings"]["sample"] > 0
    plan = load_plan(tmp_path)
    assert plan.calibration is not None
    assert plan.calibration["data"] == SAMPLES
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"Calibrated on {SAMPLES}." in card
    assert f"- data: {SAMPLES}" in card
    assert "Losses are on samples of the original" in card
    page = (tmp_path / "report.html").read_text()
    assert "not on real text" in page


def test_losses_on_real_text_and_what_a_model_does_not_know(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The embedded model has read Python, and no Greek."""
    python = Path(__file__).read_text() * 2
    alphabet = "αβγδεζηθικλμνξοπρστυφχψω"
    greek = " ".join(
        "".join(alphabet[(7 * n + 5 * i * i + n // 3) % 24] for i in range(3 + n % 6))
        for n in range(1500)
    )
    for name, text, own in (("python", python, True), ("greek", greek, False)):
        path, out = tmp_path / f"{name}.txt", tmp_path / name
        path.write_text(text, encoding="utf-8")
        given = (*OWN, f"data.val_path={path}") if own else ("data=text", f"data.path={path}")
        outcome = cli(
            *SMALL,
            *given,
            "data.sample_by=document",
            "stages=[plan,measure]",
            f"hydra.run.dir={out}",
        )
        assert outcome.code == 0, outcome.err
        data = read_summary(out)["data"]
        assert not data["own_samples_held_out"]
        assert str(path) in data["name"]
        assert data["loss"] == pytest.approx(read_summary(out)["before"]["loss"])
        if own:
            assert data["warning"] is None
            assert "hardly knows" not in outcome.out
        else:
            assert data["loss"] > data["unigram_loss"]
            assert outcome.out.count(data["warning"]) >= 1
            assert data["warning"].startswith("data.path: ")
    # Without the stage `measure`, the text is judged where a stage looks at it.
    outcome = cli(
        *SMALL,
        "data=text",
        f"data.path={tmp_path / 'greek.txt'}",
        "data.sample_by=document",
        "stages=[plan,score]",
        "importance.windows=2",
        "importance.estimator=output_norm",
        f"hydra.run.dir={tmp_path / 'scored'}",
    )
    assert outcome.code == 0, outcome.err
    assert "data.path: the original hardly knows this text" in outcome.out


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("model=tiny_llama",), "data"),
        (("data.self=3",), "data.self"),
        (("data.self.prompts=poem",), "data.self.prompts"),
        (("data.val_fraction=0",), "data.val_fraction"),
        (("data.batch_size=225",), "data.batch_size"),  # 256 windows, an eighth of them held out
    ],
)
def test_what_is_refused(
    cli: Callable[..., Any], tmp_path: Path, overrides: tuple[str, ...], key: str
) -> None:
    out = tmp_path / "out"
    outcome = cli("data=self", *overrides, "logger=none", f"hydra.run.dir={out}")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {key}: "), outcome.err
    assert "Traceback" not in outcome.err
    assert not list(out.glob("*"))
