"""How a config says that its model was saved in this project's record format."""

from __future__ import annotations

from typing import Any

METHOD = "attention_surgery"


def is_own_record(stored: Any) -> bool:
    """Whether a `quantization_config` is a record, and no quantization."""
    return _get(stored, "quant_method") == METHOD


def recorded_attributes(config: Any) -> dict[str, dict[str, Any]]:
    """Module path → attribute → value, as the record in a model's config holds them."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or not is_own_record(stored):
        return {}
    return dict(_get(stored, "attributes") or {})


def recorded_steps(config: Any) -> list[list[Any]]:
    """[kind, arguments] of every step that the record in a model's config holds."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or not is_own_record(stored):
        return []
    return list(_get(stored, "steps") or [])


def _get(stored: Any, name: str) -> Any:
    value = stored.get(name) if isinstance(stored, dict) else getattr(stored, name, None)
    return getattr(value, "value", value) if name == "quant_method" else value
