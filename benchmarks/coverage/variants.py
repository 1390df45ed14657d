"""Configs of a type besides its default: switches that give its attention another structure.

No list of keys: every switch of the config's class is turned, and kept if a model built with it has
attention blocks of other modules, tensors or attributes than the default's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.coverage import zoo
from benchmarks.coverage.exceptions import SHOWS_NOTHING
from surgery.models.reference import find_differing_attributes, get_shapes
from surgery.models.sites import find_sites
from surgery.models.tiny import get_field

# Switches of all models, none of attention.
_COMMON = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def list_variants(kind: str, model_type: str) -> list[dict[str, bool]]:
    """List the switches, each with its other value, that change attention."""
    if (kind, model_type) in zoo.UNBUILDABLE or (kind, model_type) in zoo.DECODERS:
        return []
    config = zoo.tiny_config(kind, model_type)
    default = _build(kind, config)
    found = []
    for field in dataclasses.fields(config):
        value = get_field(config, field.name)
        if not field.init or field.name in _COMMON or not isinstance(value, bool):
            continue
        if (kind, model_type, field.name) in SHOWS_NOTHING:
            continue
        fields = {field.name: not value}
        try:
            changed = _build(kind, zoo.tiny_config(kind, model_type, **fields))
        except Exception:  # not every switch can be turned alone
            continue
        if _attend_otherwise(default, changed):
            found.append(fields)
    return found


def format_variant(model_type: str, fields: dict[str, Any]) -> str:
    """``cohere use_qk_norm=true``."""
    return " ".join([model_type, *(f"{name}={str(v).lower()}" for name, v in fields.items())])


def _build(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = zoo.KINDS[kind].from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    return model


def _attend_otherwise(default: PreTrainedModel, changed: PreTrainedModel) -> bool:
    before, after = find_sites(default), find_sites(changed)
    if before != after:
        return True
    for site in before.sites:
        old, new = default.get_submodule(site.block), changed.get_submodule(site.block)
        if type(old) is not type(new) or get_shapes(old) != get_shapes(new):
            return True
        if find_differing_attributes(old, new):
            return True
    return False
