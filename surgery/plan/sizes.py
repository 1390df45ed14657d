"""Count what attention costs, from its sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from surgery.config.hints import Size
from surgery.models.sites import ROLES, Site


@dataclass(frozen=True)
class Sizes:
    """Predicted or counted sizes of a model, at a stated number of tokens.

    Attributes:
        parameters: of the whole model, shared ones once.
        kv_bytes: of the cache over all layers, once it holds that many tokens.
        kv_bytes_per_token: the same per token.
        attention_flops: forward pass of all attention blocks over that many tokens, projections
            included (a multiply-add counts as two).
    """

    parameters: Size
    kv_bytes: Size
    kv_bytes_per_token: float
    attention_flops: Size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_sizes(parameters: int, sites: Iterable[Site], tokens: int, bytes_per_value: int) -> Sizes:
    """Count the sizes of a model with these sites, at `tokens` tokens."""
    sites = list(sites)
    cache = count_kv_bytes(sites, tokens, bytes_per_value)
    return Sizes(
        parameters, cache, divide_by_tokens(cache, tokens), count_attention_flops(sites, tokens)
    )


def count_kv_bytes(sites: Iterable[Site], tokens: int, bytes_per_value: int) -> int:
    """Σ over cached sites of cached tokens · kv_heads · (head_dim + value_dim) · bytes.

    A site with a window of W keeps at most W - 1 tokens: the query's own is added to them.
    """
    return sum(
        count_cached_tokens(site, tokens)
        * site.kv_heads
        * (site.head_dim + site.value_dim)
        * bytes_per_value
        for site in sites
        if site.cached
    )


def count_cached_tokens(site: Site, tokens: int) -> int:
    """Count how many of `tokens` tokens a site's cache holds."""
    return tokens if site.window is None else min(tokens, site.window - 1)


def divide_by_tokens(cache_bytes: int, tokens: int) -> float:
    """Divide; an integer if the result is whole."""
    whole, rest = divmod(cache_bytes, tokens)
    return cache_bytes / tokens if rest else whole


def count_attention_flops(sites: Iterable[Site], tokens: int) -> int:
    """Scores and weighted sum 4·P·Hq·d over P query-key pairs, and projections 2·N·D·d·(2Hq+2Hkv).

    P is N², half of it where attention is causal; with a window, no query has more than W keys.
    """
    total = 0
    for site in sites:
        scores = 4 * _count_pairs(site, tokens) * site.q_heads * site.head_dim
        total += scores // 2 if site.cached else scores
        heads = 2 * site.q_heads + 2 * site.kv_heads
        total += 2 * tokens * site.hidden_size * site.head_dim * heads
    return total


def count_projections(site: Site) -> int:
    """Count the parameters of a site's projections that belong to its heads."""
    total = site.hidden_size * site.output.bias
    total += site.q_heads * site.output.unit * site.output.out_features
    for role in ROLES:
        projection = site.get_projection(role)
        rows = site.count_heads(role) * projection.unit
        total += rows * (projection.in_features + projection.bias)
    return total


def _count_pairs(site: Site, tokens: int) -> int:
    """Count twice the pairs of causal attention: N² for N tokens without a window."""
    outside = 0 if site.window is None else max(0, tokens - site.window)
    return tokens * tokens - outside * outside
