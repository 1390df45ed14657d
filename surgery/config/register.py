"""Hydra's view of this package: the `recipe` group, and the config groups as a search path."""

from __future__ import annotations

from importlib.resources import files

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


def register_recipes() -> None:
    """Store every `recipes/*.yaml` as `+recipe=<name>`, merged into the global package."""
    store = ConfigStore.instance()
    for entry in sorted(files("surgery.recipes").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            node = OmegaConf.create(entry.read_text(encoding="utf-8"))
            store.store(
                group="recipe", name=entry.name, node=node, package="_global_", provider="surgery"
            )
