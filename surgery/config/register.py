"""Register in Hydra's store the group `recipe`, and operations that have no YAML file."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from surgery.config.options import get_default


def register_recipes() -> None:
    """Store every `recipes/*.yaml` as `+recipe=<name>`, merged into the global package."""
    store = ConfigStore.instance()
    for name, node in _read_recipes().items():
        store.store(group="recipe", name=name, node=node, package="_global_", provider="surgery")


def register_operation(name: str, kind: type) -> None:
    """Store `attention/<name>` with the default of every option, ``???`` if it is required.

    Args:
        kind: a dataclass.
    """
    options = {field.name: _to_plain(get_default(field)) for field in fields(kind)}
    ConfigStore.instance().store(
        group="attention", name=name, node={name: options}, provider="surgery"
    )


def _to_plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


@cache
def _read_recipes() -> dict[str, DictConfig | ListConfig]:
    """Read the recipes: file name → content; the store makes copies."""
    entries = sorted(files("surgery.recipes").iterdir(), key=lambda item: item.name)
    return {
        entry.name: OmegaConf.create(entry.read_text(encoding="utf-8"))
        for entry in entries
        if entry.name.endswith(".yaml")
    }
