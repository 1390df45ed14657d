"""Read and change a model's config; dotted keys reach nested configs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from surgery.errors import PlanError
from surgery.models.sites import Site

# Names of the number of KV heads in configs.
_KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


def make_head_count_patch(
    config: PreTrainedConfig, before: Sequence[Site], after: Sequence[Site]
) -> dict[str, Any] | None:
    """Make the config patch for new head counts.

    Returns:
        Dotted key → value; ``None`` if the config has no key for it, or would need different
        values for its sites.
    """
    patch: dict[str, Any] = {}
    for prefix in sorted({site.config_prefix for site in after}):
        holder = get_config_part(config, prefix)
        old = [site for site in before if site.config_prefix == prefix]
        new = [site for site in after if site.config_prefix == prefix]
        old_kv, new_kv = {s.kv_heads for s in old}, {s.kv_heads for s in new}
        old_q, new_q = {s.q_heads for s in old}, {s.q_heads for s in new}
        if old_kv != new_kv or old_q != new_q:
            if len(new_kv) > 1 or len(new_q) > 1:
                return None
            own = _make_site_patch(holder, new[0], kv=old_kv != new_kv, query=old_q != new_q)
            if own is None:
                return None
            patch |= {f"{prefix}{key}": value for key, value in own.items()}
    return patch


def _make_site_patch(
    config: PreTrainedConfig, site: Site, *, kv: bool, query: bool
) -> dict[str, Any] | None:
    patch: dict[str, Any] = {}
    if any(_differs_by_layer(config, name) for name in ("num_attention_heads", *_KV_KEYS)):
        return None
    if query:
        patch["num_attention_heads"] = site.q_heads
        # Without it, head_dim would become hidden_size / heads.
        patch["head_dim"] = site.head_dim
    key = next((name for name in _KV_KEYS if _has_key(config, name)), None)
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        # GPTBigCode and the older Falcon have one KV head, or as many as query heads.
        if kv and site.kv_heads not in (1, site.q_heads):
            return None
        if kv:
            patch["multi_query"] = site.kv_heads == 1
        if kv and key is not None and site.kv_heads > 1:  # read only without `multi_query`
            patch[key] = site.kv_heads
    elif key is not None and (kv or query):
        patch[key] = site.kv_heads
    elif site.kv_heads != site.q_heads:
        return None
    return patch


def _differs_by_layer(config: PreTrainedConfig, name: str) -> bool:
    """Whether each layer has its own value, so that transformers raises for the whole model's."""
    try:
        getattr(config, name, None)
    except RuntimeError:
        return True
    return False


def _has_key(config: PreTrainedConfig, name: str) -> bool:
    return hasattr(config, name) and name not in getattr(config, "attribute_map", {})


@contextmanager
def patching_config(config: PreTrainedConfig, patch: Mapping[str, Any]) -> Iterator[None]:
    """Apply `patch` inside the block, for forward passes that read the config as they run."""
    holders = [
        get_config_part(config, prefix) for prefix in {key.rpartition(".")[0] for key in patch}
    ]
    # Restore everything: a key that was absent must be absent again, and not ``None``.
    before = [(holder, dict(vars(holder))) for holder in holders]
    apply_patch(config, patch)
    try:
        yield
    finally:
        for holder, state in before:
            vars(holder).clear()
            vars(holder).update(state)


def apply_patch(config: PreTrainedConfig, patch: Mapping[str, Any]) -> None:
    """Set the dotted keys of `patch` on `config`, in place."""
    for key, value in patch.items():
        prefix, _, name = key.rpartition(".")
        # Configs change the values they get, so each gets its own copy.
        setattr(get_config_part(config, prefix), name, copy.deepcopy(value))


def check_patch(config: PreTrainedConfig, patch: Mapping[str, Any]) -> None:
    """Check that the dotted keys of `patch` are fields of an architecture's own.

    Raises:
        PlanError: one is not: it is unknown or private, belongs to every config, or is a method.
    """
    for key in patch:
        prefix, _, name = key.rpartition(".")
        if prefix and f"{prefix}." not in list_config_prefixes(config):
            raise PlanError(f"the config has no part {prefix}, for {key}")
        kind = type(get_config_part(config, prefix))
        common = hasattr(PreTrainedConfig, name) or name in PreTrainedConfig.__dataclass_fields__
        known = hasattr(get_config_part(config, prefix), name) or name == "head_dim"
        common = common or name in ("auto_map", "quantization_config") or not known
        held = getattr(kind, name, None)
        if not name.isidentifier() or name.startswith("_") or common or callable(held):
            raise PlanError(f"{key}: no plan sets this key of a {config.model_type} config")
        if isinstance(held, property):
            raise PlanError(f"{key}: a {config.model_type} config computes it")


def get_key(config: PreTrainedConfig, key: str) -> Any:
    """Return the value of a dotted key; ``None`` if there is none."""
    prefix, _, name = key.rpartition(".")
    return getattr(get_config_part(config, prefix), name, None)


def get_config_part(config: PreTrainedConfig, prefix: str) -> Any:
    """The part of a config under a dotted prefix: "", "text_config" or "text_config."."""
    for name in filter(None, prefix.split(".")):
        config = getattr(config, name)
    return config


def list_config_prefixes(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    """List the prefix of the config itself ("") and of every config in it, with the last dot."""
    yield prefix
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from list_config_prefixes(value, f"{prefix}{name}.")
