"""Heads by name, as `heads` and `protect` of `prune_heads` hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import ConfigError
from surgery.models.sites import Site

# Layer → query heads, ascending.
Heads = dict[int, list[int]]
SHAPE = "a list of heads for every layer, or {layer: [heads]}"


def parse_head_lists(given: Any, sites: Sequence[Site], key: str) -> Heads:
    """Layer → query heads, ascending, each once.

    Args:
        given: one list for every site, or layer → list; numbers of layers may be text.

    Raises:
        ConfigError: no such layer or head, or no list of heads.
    """
    by_layer: dict[int, Any] = {}
    if isinstance(given, Mapping):
        known = {site.layer for site in sites}
        for layer, heads in given.items():
            number = int(layer) if str(layer).isdigit() else layer
            if number not in known:
                raise ConfigError(key, "there is no such layer", given=layer, valid=sorted(known))
            by_layer[number] = heads
    else:
        by_layer = {site.layer: given for site in sites}
    for site in sites:
        heads = by_layer.get(site.layer, [])
        if not isinstance(heads, (list, tuple)) or not all(type(h) is int for h in heads):
            raise ConfigError(key, "is no list of heads", given=repr(heads), valid=SHAPE)
        for head in heads:
            if not 0 <= head < site.q_heads:
                raise ConfigError(
                    key,
                    f"{site.path} has no such head",
                    given=head,
                    valid=f"0 to {site.q_heads - 1}",
                )
    return {layer: sorted(set(heads)) for layer, heads in by_layer.items()}
