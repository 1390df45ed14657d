"""The option `layers` of most operations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from surgery.errors import ConfigError
from surgery.models.sites import Site

LAYERS_HELP = "layer numbers from 0; null for all"


def select_sites(
    sites: Sequence[Site],
    layers: Sequence[int] | None,
    key: str,
    removed: Collection[str] = (),
) -> list[Site]:
    """Select sites by layer number, in order; for ``None`` all that are not removed.

    Args:
        removed: paths of sites whose attention an earlier operation removes.

    Raises:
        ConfigError: the list is empty, or a number is not that of a site, or of a removed one.
    """
    left = [site for site in sites if site.path not in removed]
    if layers is None:
        return left
    if not layers:
        raise ConfigError(
            key, "must name at least one layer", given=list(layers), valid="null for all"
        )
    for layer in layers:
        if not 0 <= layer < len(sites):
            raise ConfigError(
                key, "there is no such layer", given=layer, valid=f"0 to {len(sites) - 1}"
            )
        if sites[layer].path in removed:
            raise ConfigError(
                key,
                f"{sites[layer].path} is removed by an earlier operation",
                given=layer,
                valid=[site.layer for site in left] or "none: all attention is removed",
            )
    return [sites[layer] for layer in sorted(set(layers))]


def keep_layers(sites: Sequence[Site], layers: Collection[int] | None) -> list[Site]:
    """Keep the sites with these layer numbers; all for ``None``.

    For sites of which some may be gone: a number is looked up, and need not be there.
    """
    return [site for site in sites if layers is None or site.layer in layers]
