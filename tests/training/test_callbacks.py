"""`callbacks.*`: dotted class names and their options, or a config error."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from surgery.errors import ConfigError
from surgery.training.trainer import build_callbacks

CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"


def test_entries_become_callbacks_in_order() -> None:
    stop, keep = build_callbacks(
        {
            "stop": {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "x"},
            "gone": None,
            "keep": {"_target_": CHECKPOINT, "every_n_train_steps": 7},
        }
    )
    assert isinstance(stop, EarlyStopping)
    assert stop.monitor == "x"
    assert isinstance(keep, ModelCheckpoint)
    assert keep._every_n_train_steps == 7
    assert build_callbacks({}) == []


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"every_n_steps": 1}, "_target_"),
        ("callbacks.HeadTable", "_target_"),
        ([1], "_target_"),
        ({"_target_": "no_such_package.Thing"}, "no_such_package"),
        ({"_target_": "pytorch_lightning.callbacks.NoSuch"}, "NoSuch"),
        ({"_target_": CHECKPOINT, "every": 1}, "'every'"),
        ({"_target_": "pytorch_lightning.callbacks.EarlyStopping"}, "'monitor'"),
        ({"_target_": CHECKPOINT, "every_n_train_steps": 1, "every_n_epochs": 1}, "exclusive"),
        ({"_target_": "collections.OrderedDict"}, "must be a Lightning callback"),
        ({"_target_": CHECKPOINT, "_partial_": True}, "must be a Lightning callback"),
        ({"_target_": "os.system", "command": "true"}, "os.system"),
        ({"_target_": "math.pi"}, "callable"),
    ],
)
def test_what_is_no_callback_is_refused(entry: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_callbacks({"mine": entry})
    assert caught.value.key == "callbacks.mine"
    assert text in caught.value.problem
    assert "\n" not in caught.value.problem


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build_callbacks({"mine": {"_target_": CHECKPOINT, "every": 1}})
    assert {"dirpath", "every_n_train_steps"} <= set(str(caught.value.valid).split(", "))
