"""Plain progress lines, and the curve of losses, from real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.training import curve
from surgery.training.progress import PlainProgress
from tests.training.making import Losses, fit, operated, save_model, small_data


def test_a_line_every_tenth_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = operated(save_model(tmp_path / "model"))
    progress = PlainProgress(lines=3, seconds=1e9)
    losses = Losses()
    fit(module, small_data(tmp_path), tmp_path, max_steps=7, callbacks=[losses, progress])
    lines = [line for line in capsys.readouterr().out.splitlines() if "training: step" in line]
    assert [line.split()[2] for line in lines] == ["2/7", "4/7", "6/7", "7/7"]
    assert f"{losses.values[6]:.4f}" in lines[-1]


def test_the_curve_is_the_losses(tmp_path: Path) -> None:
    module = operated(save_model(tmp_path / "model"))
    losses, loss_curve = Losses(), curve.LossCurve()
    fit(module, small_data(tmp_path), tmp_path, max_steps=6, callbacks=[losses, loss_curve])
    assert loss_curve.points == list(enumerate(losses.values, start=1))


def test_a_long_curve_is_thinned_evenly_and_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "MOST_POINTS", 5)
    folder = save_model(tmp_path / "model")
    first, second = curve.LossCurve(), curve.LossCurve()
    stop = Losses(stop=9)
    trainer = fit(
        operated(folder), small_data(tmp_path), tmp_path, max_steps=14, callbacks=[stop, first]
    )
    trainer.save_checkpoint(tmp_path / "nine.ckpt")
    losses = Losses()
    fit(
        operated(folder),
        small_data(tmp_path),
        tmp_path,
        max_steps=14,
        callbacks=[losses, second],
        resume=tmp_path / "nine.ckpt",
    )
    values = stop.values + losses.values
    assert [step for step, _ in second.points] == [4, 8, 12]
    assert all(loss == values[step - 1] for step, loss in second.points)
