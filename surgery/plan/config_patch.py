"""What the architecture's own config must say about the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from surgery.anatomy import Site


def head_count_patch(before: Sequence[Site], after: Sequence[Site]) -> dict[str, Any]:
    """Config keys whose value must change, where one value says it for all sites of a config."""
    patch: dict[str, Any] = {}
    for prefix in sorted({site.config_prefix for site in after}):
        counts = {site.kv_heads for site in after if site.config_prefix == prefix}
        old = {site.kv_heads for site in before if site.config_prefix == prefix}
        if counts != old and len(counts) == 1:
            patch[f"{prefix}num_key_value_heads"] = counts.pop()
    return patch


def apply_patch(config: PreTrainedConfig, patch: Mapping[str, Any]) -> None:
    """Set dotted `patch` keys on `config`, in place."""
    for key, value in patch.items():
        *parents, name = key.split(".")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
