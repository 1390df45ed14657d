"""Alarms: which heads, from which step on, how often, and what happens then."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from surgery.callbacks import AttentionStatistics, HeadAlarms
from surgery.callbacks.head_monitor import HeadMonitor, Observation

from surgery.observe import AttentionCall
from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens

NAN = float("nan")
BATCH = unpadded(tokens(2, 8))


class Scripted(HeadMonitor):
    """Observes what it is told."""

    name = "scripted"
    metrics = ("normalized_entropy", "max_logit", "output_norm")

    def __init__(self, figures: list[dict[str, list[float]]], heads: list[int]) -> None:
        super().__init__(1, 1)
        self.script = [
            Observation(
                step=step,
                heads=heads,
                metrics={name: torch.tensor(row) for name, row in each.items()},
            )
            for step, each in enumerate(figures)
        ]

    def observe(self, call: AttentionCall) -> None:
        pass

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        assert self._tap is not None
        self._tap.close()
        self.observations += self.script


def judged(
    root: Path, figures: list[dict[str, list[float]]], heads: list[int], **options: Any
) -> HeadAlarms:
    alarms = HeadAlarms(**options)
    fit(OwnModule(tiny_model("llama")), [BATCH], [Scripted(figures, heads), alarms], root)
    return alarms


def raised(alarms: HeadAlarms) -> list[tuple[str, int, int, int]]:
    return [(a["alarm"], a["step"], a["layer"], a["head"]) for a in alarms.alarms]


def by_hand(values: list[float], patience: int, bad: Any) -> list[int]:
    """Steps at which one head alarms: after `patience` bad ones in a row, once until it is well."""
    steps, streak, silent = [], 0, False
    for step, value in enumerate(values):
        if math.isnan(value):
            continue
        streak = streak + 1 if bad(value) else 0
        if streak == 0:
            silent = False
        if streak >= patience and not silent:
            steps.append(step)
            silent = True
    return steps


figures = st.lists(
    st.lists(st.sampled_from([0.0, 10.0, 999.0, 1000.0, math.inf, NAN]), min_size=3, max_size=3),
    min_size=1,
    max_size=12,
)


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(figures, st.integers(1, 3))
def test_a_head_alarms_once_and_again_after_it_recovered(
    tmp_path: Path, rows: list[list[float]], patience: int
) -> None:
    alarms = judged(tmp_path, [{"max_logit": row} for row in rows], [2, 1], patience=patience)
    expected = []
    for index, (layer, head) in enumerate([(0, 0), (0, 1), (1, 0)]):
        steps = by_hand([row[index] for row in rows], patience, lambda x: x >= 1000)
        expected += [("logits", step, layer, head) for step in steps]
    assert sorted(raised(alarms)) == sorted(expected)
    assert all(math.isfinite(a["value"]) for a in alarms.alarms)  # JSON has no infinity


def test_collapse_is_a_fall(tmp_path: Path) -> None:
    """A head that is as sharp as ever does its work; one that used to be wider has collapsed."""
    rows = [[0.5, 0.01, 0.5], [0.6, 0.008, 0.5], [0.011, 0.009, 0.05], [0.013, 0.007, 0.04]]
    alarms = judged(
        tmp_path, [{"normalized_entropy": row} for row in rows], [3], collapse=0.02, patience=1
    )
    assert raised(alarms) == [("collapse", 2, 0, 0)]
    assert alarms.alarms[0]["value"] == pytest.approx(0.011)
    assert alarms.alarms[0]["threshold"] == pytest.approx(0.02 * 0.6)


def test_dead_is_silent_beside_its_own_past_or_its_layer(tmp_path: Path) -> None:
    """All heads of a layer may die together; one may be dead from the first step on."""
    rows = [
        [2.0, 2.0, 0.0, 5.0, 4.0],
        [2.0, 2.1, 0.0, 0.01, 0.02],
        [0.5, 2.0, 0.0, 0.01, 0.02],
    ]
    alarms = judged(tmp_path, [{"output_norm": row} for row in rows], [3, 2], patience=2)
    assert raised(alarms) == [("dead", 1, 0, 2), ("dead", 2, 1, 0), ("dead", 2, 1, 1)]


def test_what_lies_before_the_warm_up_is_forgotten(tmp_path: Path) -> None:
    rows = [[1.0], [0.999], [0.1], [0.015], [0.01], [0.015], [0.999]]
    alarms = judged(
        tmp_path, [{"normalized_entropy": row} for row in rows], [1], patience=1, warmup_steps=2
    )
    assert raised(alarms) == [("uniform", 6, 0, 0)]


def test_a_threshold_of_null_is_no_alarm(tmp_path: Path) -> None:
    rows = [{"normalized_entropy": [0.999], "max_logit": [1e9], "output_norm": [0.0]}] * 3
    options = {"collapse": None, "uniform": None, "logits": None}
    assert {kind for kind, *_ in raised(judged(tmp_path, rows, [1], **options))} == {"dead"}


class Sabotage(Callback):
    """Breaks some heads before certain steps, and mends them before others."""

    def __init__(self, breaks: set[int], mends: set[int]) -> None:
        self.breaks, self.mends = breaks, mends

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first, second = (layer.self_attn for layer in pl_module.net.model.layers)
        if trainer.global_step in self.breaks:
            self.whole = {k: v.clone() for k, v in pl_module.state_dict().items()}
            with torch.no_grad():
                first.q_proj.weight[:8] = 0  # head 0 looks everywhere
                first.q_proj.weight[8:16] *= 1e6  # head 1 at one key, and from afar
                second.v_proj.weight[:8] = 0  # heads 0 and 1 share it, and say nothing
        if trainer.global_step in self.mends:
            pl_module.load_state_dict(self.whole)


BROKEN = [("collapse", 0, 1), ("dead", 1, 0), ("dead", 1, 1), ("logits", 0, 1), ("uniform", 0, 0)]


def test_broken_heads_of_a_real_model_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms = HeadAlarms(patience=2)
    watching: list[Callback] = [AttentionStatistics(1, 1, rows=None), alarms]
    callbacks = [Sabotage({2, 7}, {5}), *watching]
    trainer = fit(OwnModule(tiny_model("llama")), [BATCH] * 10, callbacks, tmp_path)
    seen = raised(alarms)
    assert sorted(seen) == sorted(
        (kind, step, layer, head) for kind, layer, head in BROKEN for step in (3, 8)
    )
    assert trainer.global_step == 10
    said = [line for line in capsys.readouterr().out.splitlines() if "head_alarms" in line]
    assert len(said) == 4 * 2  # a line per kind and step, not per head
    assert "step 3: dead: output_norm past" in said[3]
    assert "in 2 heads (layer.head): 1.0 (0), 1.1 (0)" in said[3]


def test_training_stops_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarms = HeadAlarms(patience=2, action="stop")
    callbacks: list[Callback] = [Sabotage({2}, set()), AttentionStatistics(1, 1, rows=None), alarms]
    trainer = fit(OwnModule(tiny_model("llama")), [BATCH] * 10, callbacks, tmp_path)
    assert trainer.global_step == 4
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "training ends" in line]
    assert "after step 3: action=stop, and collapse: normalized_entropy past" in said


def test_a_healthy_model_raises_none(tmp_path: Path) -> None:
    alarms = HeadAlarms(patience=1)
    watching: list[Callback] = [AttentionStatistics(1, 1), alarms]
    fit(OwnModule(tiny_model("llama"), lr=0.1), [BATCH] * 6, watching, tmp_path)
    assert alarms.alarms == []


def test_it_says_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watching: list[Callback] = [
        AttentionStatistics(1, 1, metrics=["max_logit"]),
        HeadAlarms(action="alert", dead=None),
    ]
    fit(OwnModule(tiny_model("llama")), [BATCH], watching, tmp_path)
    out = capsys.readouterr().out
    assert "no monitor observes the metrics of: collapse (normalized_entropy), uniform" in out
    assert "dead" not in out
    assert "action=alert needs logger=wandb" in out


def test_a_resumed_run_raises_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """In the middle of a head's patience; and what was said is not said again."""

    def callbacks() -> list[Callback]:
        return [AttentionStatistics(1, 1, rows=None), HeadAlarms(patience=3)]

    whole = callbacks()
    batches = [BATCH] * 8
    fit(OwnModule(tiny_model("llama")), batches, [Sabotage({1}, set()), *whole], tmp_path / "a")
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = [Sabotage({1}, set()), *callbacks(), saving]
    options = {"enable_checkpointing": True}
    fit(OwnModule(tiny_model("llama")), batches, first, tmp_path / "b", **options)
    for stop in (3, 6):  # before the third bad observation, and after it
        torch.load(tmp_path / f"step={stop}.ckpt", weights_only=True)
        again = callbacks()
        fit(
            OwnModule(tiny_model("llama")),
            batches,
            again,
            tmp_path / "c",
            resume=tmp_path / f"step={stop}.ckpt",
        )
        assert again[1].alarms == whole[1].alarms  # type: ignore[attr-defined]
    assert {step for _, step, _, _ in raised(whole[1])} == {3}  # type: ignore[arg-type]
