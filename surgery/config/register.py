"""Hydra's view of this package: the `recipe` group, and the config groups as a search path."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf


def register_recipes() -> None:
    """Store every `recipes/*.yaml` as `+recipe=<name>`, merged into the global package."""
    store = ConfigStore.instance()
    for name, node in _recipes().items():
        store.store(group="recipe", name=name, node=node, package="_global_", provider="surgery")


@cache
def _recipes() -> dict[str, DictConfig | ListConfig]:
    """File name → content; the store keeps copies."""
    entries = sorted(files("surgery.recipes").iterdir(), key=lambda item: item.name)
    return {
        entry.name: OmegaConf.create(entry.read_text(encoding="utf-8"))
        for entry in entries
        if entry.name.endswith(".yaml")
    }
