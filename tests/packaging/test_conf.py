"""conf/ and the schema say the same: no default that cannot be seen, no key without a type."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import surgery.hydra  # noqa: F401
from surgery.config.__main__ import rewrite_folder, write_operation_yaml
from surgery.config.schema import RunConfig
from surgery.config.validate import check_config
from surgery.errors import ConfigError
from surgery.plan.registry import (
    list_options,
    parse_operations,
)

from .conftest import ROOT, find_own_operations

# Groups whose keys are somebody else's: operations', Lightning's, a callback's.
OPEN_GROUPS = {"attention", "trainer", "callbacks"}
TYPED = {name: hint for name, hint in get_type_hints(RunConfig).items() if is_dataclass(hint)}
# Sections of config.yaml itself, with no choice of files.
SECTIONS = {
    "report",
    "analysis",
    "importance",
    "tasks",
    "calibration",
    "measure",
    "plan",
    "validation",
    "export",
}
# What the files leave open with `???`; a number where it is not named here.
FILLED = {"data.path": "x.txt"}
# By file: options that it leaves at null, of which one (or all) has to be given.
CHOSEN: dict[str, dict[str, Any]] = {
    "fit_budget": {"target": {"kv_bytes": 0.5}},
    "prune_heads": {"heads": [0]},
    "rope_longrope": {"short_factor": [1.0], "long_factor": [2.0]},
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


GROUP_FILES = [
    (folder.name, name)
    for folder in sorted((ROOT / "conf").iterdir())
    if folder.is_dir() and folder.name != "__pycache__"
    for name in choices(folder.name)
]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("surgery.conf", version_base="1.3"):
        yield


@cache
def _composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=[*overrides, "run_dir=somewhere"])


def composed(*overrides: str) -> DictConfig:
    return copy.deepcopy(_composed(*overrides))


def chosen(group: str, name: str) -> DictConfig:
    value = f"[{name}]" if group == "attention" else name
    return composed(f"{group}={value}")


def test_the_run_has_the_keys_of_the_schema() -> None:
    cfg = composed("attention=[mqa]")  # an empty list of operations leaves no key behind
    assert {str(key) for key in cfg} == {field.name for field in fields(RunConfig)}


def test_every_folder_of_conf_is_a_field_and_every_typed_field_a_folder() -> None:
    assert {group for group, _ in GROUP_FILES} == (set(TYPED) - SECTIONS) | OPEN_GROUPS


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_section_has_the_keys_of_its_dataclass(section: str) -> None:
    assert {str(key) for key in composed()[section]} == {f.name for f in fields(TYPED[section])}


@pytest.mark.parametrize(
    ("group", "name"), [pair for pair in GROUP_FILES if pair[0] not in OPEN_GROUPS]
)
def test_a_file_has_the_keys_of_its_dataclass(group: str, name: str) -> None:
    keys = {str(key) for key in chosen(group, name)[group]}
    assert keys == {field.name for field in fields(TYPED[group])}


@pytest.mark.parametrize("name", choices("attention"))
def test_an_attention_file_has_the_keys_of_its_operation(name: str) -> None:
    held = chosen("attention", name).attention
    assert held
    for operation, options in held.items():
        assert operation in find_own_operations()
        assert sorted(options) == sorted(list_options(operation))


def test_every_operation_can_be_chosen_by_its_name() -> None:
    assert set(find_own_operations()) <= set(choices("attention"))


@pytest.mark.parametrize("name", choices("attention"))
def test_an_attention_file_parses_once_it_is_filled_in(name: str) -> None:
    options = OmegaConf.to_container(chosen("attention", name).attention)
    assert isinstance(options, dict)
    filled: Any = {
        str(operation): {k: 2 if v == "???" else v for k, v in values.items()}
        | CHOSEN.get(name, {})
        for operation, values in options.items()
    }
    (operation,) = parse_operations(filled)
    assert operation.name in filled


@pytest.mark.parametrize("name", choices("callbacks"))
def test_a_callback_shows_all_its_options(name: str) -> None:
    """Ours in full; of other people's, the options we set have to exist."""
    for key, entry in chosen("callbacks", name).callbacks.items():
        target = get_class(entry["_target_"])
        parameters = list(inspect.signature(target.__init__).parameters.values())[1:]
        known = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        given = {str(option) for option in entry} - {"_target_"}
        if target.__module__.startswith("surgery."):
            assert given == known, key
        else:
            assert given <= known, key


def test_comments_are_those_of_the_options(tmp_path: Path) -> None:
    """Where this fails, `make conf` mends it."""
    folder = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    assert [path.relative_to(folder) for path in rewrite_folder(folder)] == []


def test_lines_are_no_longer_than_those_of_the_code() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert len(line) <= 100, f"{path}: {line}"


@pytest.mark.parametrize("name", sorted(find_own_operations()))
def test_the_yaml_of_an_operation_holds_its_defaults(name: str) -> None:
    kind = find_own_operations()[name]
    defaults = {field: getattr(kind, field, "???") for field in list_options(name)}
    plain = {k: v.name if isinstance(v, Enum) else v for k, v in defaults.items()}
    assert yaml.safe_load(write_operation_yaml(f"attention.{name}")) == {name: plain}


def test_there_is_no_yaml_of_what_is_no_operation() -> None:
    with pytest.raises(ConfigError, match="no such operation") as caught:
        write_operation_yaml("attention.gqqa")
    assert caught.value.valid is not None
    assert "attention.gqa" in caught.value.valid


@pytest.mark.parametrize(("group", "name"), GROUP_FILES)
def test_every_file_passes_the_checks(group: str, name: str) -> None:
    cfg = chosen(group, name)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        OmegaConf.update(cfg, key, FILLED.get(key, 2))
    check_config(cfg)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_the_checks(recipe: str) -> None:
    run = check_config(composed(f"+recipe={recipe}"))
    parse_operations(run.attention)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_something(recipe: str) -> None:
    assert composed(f"+recipe={recipe}") != composed()


def test_an_unknown_recipe_lists_the_valid_ones() -> None:
    with pytest.raises(MissingConfigException) as caught:
        composed("+recipe=nothing_of_the_kind")
    for recipe in RECIPES:
        assert f"\t{recipe}\n" in str(caught.value)


def test_recipes_are_flat() -> None:
    """Hydra is given the files of the folder itself; one further down would not be found."""
    folder = ROOT / "recipes"
    assert set(folder.rglob("*.yaml")) == set(folder.glob("*.yaml"))
