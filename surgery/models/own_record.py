"""Read what a config says about a model that was saved in this project's record format."""

from __future__ import annotations

from typing import Any

METHOD = "attention_surgery"


def is_own_record(stored: Any) -> bool:
    """Whether a `quantization_config` is a record of this project, not a quantization."""
    return _get(stored, "quant_method") == METHOD


def find_record(config: Any) -> Any:
    """Find the record in a model's config; ``None`` if it has none."""
    stored = getattr(config, "quantization_config", None)
    return stored if is_own_record(stored) else None


def read_recorded_attributes(config: Any) -> dict[str, dict[str, Any]]:
    """Read module path → attribute → value from the record in a model's config."""
    return dict(_get(find_record(config), "attributes") or {})


def read_recorded_steps(config: Any) -> list[list[Any]]:
    """Read [kind, arguments] of every step from the record in a model's config."""
    return list(_get(find_record(config), "steps") or [])


def _get(stored: Any, name: str) -> Any:
    value = stored.get(name) if isinstance(stored, dict) else getattr(stored, name, None)
    return getattr(value, "value", value) if name == "quant_method" else value
