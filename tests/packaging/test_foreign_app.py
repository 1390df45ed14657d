"""Somebody else's Hydra app gets our groups by one import, and keeps its own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Runner

FILES = {
    "callbacks/__init__.py": "class Mine:\n    pass\n",
    "conf/config.yaml": (
        "defaults:\n  - attention: []\n  - callbacks: default\n  - _self_\n"
        "learning_rate: 0.1\ntrainer: {max_steps: 5}\n"
    ),
    "conf/without_attention.yaml": "learning_rate: 0.1\n",
    "conf/callbacks/default.yaml": "mine:\n  _target_: callbacks.Mine\n",
    "app.py": """
import json

import callbacks
import hydra
import surgery.hydra
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    mine = hydra.utils.instantiate(cfg.callbacks.mine) if "callbacks" in cfg else None
    print(json.dumps({
        "config": OmegaConf.to_container(cfg),
        "callbacks": callbacks.__file__,
        "mine": type(mine).__module__,
    }))


main()
""",
}


@pytest.fixture
def app(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_our_recipe_in_their_app(app: Path, python: Runner) -> None:
    done = python("app.py", "+recipe=gqa_convert", path=app)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["config"]["attention"]["gqa"]["kv_heads"] == 2
    assert seen["config"]["learning_rate"] == 0.1
    assert "recipe" not in seen["config"]


def test_our_group_in_their_app(app: Path, python: Runner) -> None:
    done = python("app.py", "attention=[gqa]", "attention.gqa.kv_heads=4", path=app)
    assert done.returncode == 0, done.stderr
    gqa = json.loads(done.stdout)["config"]["attention"]["gqa"]
    assert gqa["kv_heads"] == 4
    assert gqa["merge"] == "mean"


def test_their_names_are_theirs(app: Path, python: Runner) -> None:
    """Their `callbacks` package, their file `conf/callbacks/default.yaml`, their config."""
    done = python("app.py", path=app)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["callbacks"]) == app / "callbacks" / "__init__.py"
    assert seen["mine"] == "callbacks"
    assert seen["config"] == {
        "callbacks": {"mine": {"_target_": "callbacks.Mine"}},
        "learning_rate": 0.1,
        "trainer": {"max_steps": 5},
    }


def test_the_group_can_be_added_where_there_was_none(app: Path, python: Runner) -> None:
    done = python(
        "app.py",
        "--config-name=without_attention",
        "+attention=[gqa]",
        "attention.gqa.kv_heads=4",
        path=app,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["attention"]["gqa"]["kv_heads"] == 4


def test_a_recipe_never_changes_nothing_quietly(app: Path, python: Runner) -> None:
    """A config without the group `attention`: the recipe brings it, or Hydra names it."""
    done = python("app.py", "--config-name=without_attention", "+recipe=gqa_convert", path=app)
    if done.returncode:
        assert "'attention'" in done.stderr
    else:
        assert json.loads(done.stdout)["config"]["attention"]["gqa"]["kv_heads"] == 2


def test_a_misspelt_recipe_lists_ours(app: Path, python: Runner) -> None:
    done = python("app.py", "+recipe=gqa_convertt", path=app)
    assert done.returncode != 0
    assert "gqa_convert\n" in done.stderr
    assert "pretrain_tiny" in done.stderr
