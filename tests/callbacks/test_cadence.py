"""When monitors look: every n-th optimizer step, the first included, and never in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from surgery.callbacks import AttentionStatistics, HeadAlarms, HeadImportance
from transformers import AttentionInterface

from surgery.errors import ConfigError
from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens

ORIGINAL = AttentionInterface.get_interface


def batches(count: int) -> list[Any]:
    return [unpadded(tokens(2, 6, seed=i)) for i in range(count)]


def steps(monitor: AttentionStatistics | HeadImportance) -> list[int]:
    return [observation["step"] for observation in monitor.observations]


class Watch(Callback):
    """Notes at which steps something is in the way of attention."""

    def __init__(self) -> None:
        self.tapped: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: object) -> None:
        if AttentionInterface.get_interface is not ORIGINAL:
            self.tapped.append(trainer.global_step)


@pytest.mark.parametrize("monitor_class", [AttentionStatistics, HeadImportance])
def test_every_nth_step(monitor_class: Any, tmp_path: Path) -> None:
    monitor = monitor_class(every_n_steps=3, heatmap_every_n_steps=3)
    fit(OwnModule(tiny_model("llama"), lr=0.1), batches(8), [monitor], tmp_path)
    assert steps(monitor) == [0, 3, 6]
    assert AttentionInterface.get_interface is ORIGINAL


def test_nothing_is_in_the_way_between_observed_steps(tmp_path: Path) -> None:
    watch = Watch()
    fit(
        OwnModule(tiny_model("llama")),
        batches(7),
        [HeadImportance(every_n_steps=3, heatmap_every_n_steps=3), watch],
        tmp_path,
    )
    assert watch.tapped == [0, 3, 6]


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    """With accumulation every micro-batch of an observed step is seen; a short last one too."""
    monitor = HeadImportance(every_n_steps=2, heatmap_every_n_steps=2)
    module = OwnModule(tiny_model("llama"))
    fit(module, batches(13), [monitor], tmp_path, accumulate_grad_batches=3)
    assert steps(monitor) == [0, 2, 4]
    assert monitor._tap is not None
    assert monitor._tap.calls == 2 * (3 + 3 + 1)


def test_the_count_goes_on_over_epochs(tmp_path: Path) -> None:
    monitor = AttentionStatistics(every_n_steps=2, heatmap_every_n_steps=2)
    fit(OwnModule(tiny_model("llama")), batches(3), [monitor], tmp_path, max_epochs=2)
    assert steps(monitor) == [0, 2, 4]


def test_an_epoch_that_is_cut_short_leaves_the_tap_closed(tmp_path: Path) -> None:
    class Impatient(OwnModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    monitor, tapped = HeadImportance(1, 1), []

    class Between(Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            tapped.append(AttentionInterface.get_interface is not ORIGINAL)

    fit(Impatient(tiny_model("llama")), batches(4), [monitor, Between()], tmp_path, max_epochs=2)
    assert tapped == [False, False]
    assert AttentionInterface.get_interface is ORIGINAL
    assert steps(monitor) == [0, 1, 2, 3]


def test_an_error_in_training_leaves_the_tap_closed(tmp_path: Path) -> None:
    class Failing(OwnModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("out of patience")

    with pytest.raises(RuntimeError, match="out of patience"):
        fit(
            Failing(tiny_model("llama")),
            batches(2),
            [HeadImportance(1, 1), AttentionStatistics(1, 1)],
            tmp_path,
        )
    assert AttentionInterface.get_interface is ORIGINAL


def test_training_again_starts_afresh(tmp_path: Path) -> None:
    monitor = AttentionStatistics(1, 1)
    fit(OwnModule(tiny_model("llama")), batches(2), [monitor], tmp_path)
    fit(OwnModule(tiny_model("gpt2")), batches(2), [monitor], tmp_path)
    assert steps(monitor) == [0, 1, 0, 1]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (HeadImportance, {"every_n_steps": 0}, "head_importance.every_n_steps"),
    (HeadImportance, {"every_n_steps": 2.5}, "head_importance.every_n_steps"),
    (HeadImportance, {"every_n_steps": "often"}, "head_importance.every_n_steps"),
    (HeadImportance, {"heatmap_every_n_steps": 30}, "head_importance.heatmap_every_n_steps"),
    (HeadImportance, {"heatmap_every_n_steps": 0}, "head_importance.heatmap_every_n_steps"),
    (AttentionStatistics, {"every_n_steps": -1}, "attention_statistics.every_n_steps"),
    (
        AttentionStatistics,
        {"heatmap_every_n_steps": 24},
        "attention_statistics.heatmap_every_n_steps",
    ),
    (AttentionStatistics, {"rows": 0}, "attention_statistics.rows"),
    (AttentionStatistics, {"rows": 1.5}, "attention_statistics.rows"),
    (AttentionStatistics, {"rows": "some"}, "attention_statistics.rows"),
    (AttentionStatistics, {"metrics": "entropy"}, "attention_statistics.metrics"),
    (HeadAlarms, {"collapse": 1.5}, "head_alarms.collapse"),
    (HeadAlarms, {"uniform": "high"}, "head_alarms.uniform"),
    (HeadAlarms, {"logits": -1}, "head_alarms.logits"),
    (HeadAlarms, {"dead": True}, "head_alarms.dead"),
    (HeadAlarms, {"patience": 0}, "head_alarms.patience"),
    (HeadAlarms, {"warmup_steps": 0.5}, "head_alarms.warmup_steps"),
    (HeadAlarms, {"action": "shout"}, "head_alarms.action"),
]


@pytest.mark.parametrize(("monitor_class", "options", "key"), BAD)
def test_options_that_cannot_be(monitor_class: Any, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        monitor_class(**options)
    assert caught.value.key == key
    assert caught.value.given == next(iter(options.values()))


def test_unknown_metrics_are_named_and_the_valid_ones_with_them() -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionStatistics(metrics=["max_logit", "entropy", "sink"])
    assert caught.value.given == "entropy, sink"
    assert "attention_entropy" in str(caught.value.valid)
