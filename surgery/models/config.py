"""Reading and changing a model's config, nested ones by dotted keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from surgery.models.sites import Site

# What configs call the number of KV heads.
_KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


def head_count_patch(
    config: PreTrainedConfig, before: Sequence[Site], after: Sequence[Site]
) -> dict[str, Any] | None:
    """Config keys whose value must change, where one value says it for all sites of a config.

    Returns:
        ``None`` where the config has no key that could say it.
    """
    patch: dict[str, Any] = {}
    for prefix in sorted({site.config_prefix for site in after}):
        holder = config_at(config, prefix)
        old = [site for site in before if site.config_prefix == prefix]
        new = [site for site in after if site.config_prefix == prefix]
        old_kv, new_kv = {s.kv_heads for s in old}, {s.kv_heads for s in new}
        old_q, new_q = {s.q_heads for s in old}, {s.q_heads for s in new}
        if old_kv != new_kv or old_q != new_q:
            if len(new_kv) > 1 or len(new_q) > 1:
                return None
            said = _said(holder, new[0], kv=old_kv != new_kv, query=old_q != new_q)
            if said is None:
                return None
            patch |= {f"{prefix}{key}": value for key, value in said.items()}
    return patch


def _said(config: PreTrainedConfig, site: Site, *, kv: bool, query: bool) -> dict[str, Any] | None:
    patch: dict[str, Any] = {}
    if query:
        patch["num_attention_heads"] = site.q_heads
        # Otherwise it would be hidden_size / heads.
        patch["head_dim"] = site.head_dim
    key = next((name for name in _KV_KEYS if _has(config, name)), None)
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        # GPTBigCode and the older Falcon: one KV head, or as many as queries.
        if kv and site.kv_heads not in (1, site.q_heads):
            return None
        if kv:
            patch["multi_query"] = site.kv_heads == 1
    elif key is not None and (kv or query):
        patch[key] = site.kv_heads
    elif site.kv_heads != site.q_heads:
        return None
    return patch


def _has(config: PreTrainedConfig, name: str) -> bool:
    return hasattr(config, name) and name not in getattr(config, "attribute_map", {})


@contextmanager
def patched(config: PreTrainedConfig, patch: Mapping[str, Any]) -> Iterator[None]:
    """Hold `patch` for a while, for forwards that read their config as they run."""
    holders = [config_at(config, prefix) for prefix in {key.rpartition(".")[0] for key in patch}]
    # Whole, since a key that was not there must not be there again: a `head_dim` of None is none.
    before = [(holder, dict(vars(holder))) for holder in holders]
    apply_patch(config, patch)
    try:
        yield
    finally:
        for holder, state in before:
            vars(holder).clear()
            vars(holder).update(state)


def apply_patch(config: PreTrainedConfig, patch: Mapping[str, Any]) -> None:
    """Set dotted `patch` keys on `config`, in place."""
    for key, value in patch.items():
        prefix, _, name = key.rpartition(".")
        # Configs write into what they are given.
        setattr(config_at(config, prefix), name, copy.deepcopy(value))


def get_key(config: PreTrainedConfig, key: str) -> Any:
    """The value under a dotted key; ``None`` where there is none."""
    prefix, _, name = key.rpartition(".")
    return getattr(config_at(config, prefix), name, None)


def config_at(config: PreTrainedConfig, prefix: str) -> Any:
    """The part of a config under a dotted prefix: "", "text_config" or "text_config."."""
    for name in filter(None, prefix.split(".")):
        config = getattr(config, name)
    return config


def config_prefixes(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    """Prefixes of the config itself ("") and of every config within it, with their last dot."""
    yield prefix
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from config_prefixes(value, f"{prefix}{name}.")
