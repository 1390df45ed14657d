"""How many positions a model was trained for, and how many it is for after a change of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import ConfigError
from surgery.operations.rope.kinds import HOLDS_ORIGINAL, SCALED, RopeType

MAX = "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"


def find_original_length(
    config: Any, current: Mapping[str, Any], stated: int | None, key: str
) -> int | None:
    """Find the positions before any scaling; ``None`` where the config has none.

    Args:
        config: the part of the model's config that holds `max_position_embeddings`.
        current: its `rope_parameters`, flat.
        stated: what the user says it is.
        key: dotted config key of the operation.

    Raises:
        ConfigError: the model is scaled already in a way that does not say from what.
    """
    maximum = getattr(config, MAX, None)
    held = current.get(ORIGINAL)
    if held is None:
        # Phi-3 keeps it beside `rope_parameters`; its default may mean nothing for this model.
        beside = getattr(config, ORIGINAL, None)
        held = beside if beside is not None and maximum is not None and beside <= maximum else None
    if stated is not None:
        if held is not None and stated != held:
            raise ConfigError(
                f"{key}.{ORIGINAL}",
                "the model's config holds another length",
                given=stated,
                valid=f"null, or {held}",
            )
        return stated
    if held is None and current.get("factor", 1.0) > 1 and current.get("rope_type") != "dynamic":
        raise ConfigError(
            f"{key}.{ORIGINAL}",
            f"the model's positions are scaled already ({current.get('rope_type')}, factor "
            f"{current['factor']:g}), and its config does not say from what length",
            valid="the positions it was trained for before that",
        )
    return maximum if held is None else held


def choose_maximum(
    kind: RopeType,
    given: Mapping[str, Any],
    original: int | None,
    current: int | None,
    held: bool,
    key: str,
) -> int | None:
    """Choose the result's `max_position_embeddings`; ``None`` where the config has none.

    Args:
        given: options that are not ``None``.
        original: positions before scaling.
        current: the model's `max_position_embeddings`.
        held: whether the model is scaled, and its config says from what length.
        key: dotted config key of the operation.

    Raises:
        ConfigError: it would be shorter than the original, or is needed and not known.
    """
    wanted, factor = given.get(MAX), given.get("factor")
    if original is None:
        if kind in HOLDS_ORIGINAL or kind is RopeType.dynamic:
            raise ConfigError(
                f"{key}.{ORIGINAL}",
                f"type {kind.value} needs it, and the model's config has no {MAX}",
                valid="the positions the model was trained for",
            )
        return wanted
    if wanted is not None and wanted < original:
        raise ConfigError(
            f"{key}.{MAX}",
            f"shorter than the {original} positions the model was trained for",
            given=wanted,
            valid=f"{original} or more",
        )
    if kind is RopeType.dynamic:
        if wanted not in (None, original):
            raise ConfigError(
                f"{key}.{MAX}",
                "type dynamic starts to scale beyond it, so it stays the original",
                given=wanted,
                valid=f"null, or {original}",
            )
        return original
    if wanted is not None:
        return wanted
    if kind is RopeType.longrope and factor is None:
        raise ConfigError(
            f"{key}.factor", f"type longrope needs it, or {MAX}", valid="a number above 1"
        )
    if kind in SCALED and factor is not None:
        return int(original * factor)
    return original if held and kind is RopeType.default else current
