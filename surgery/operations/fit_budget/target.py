"""What the model may cost: bounds that are linear in what becomes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.plan.sizes import count_attention_flops, count_kv_bytes, count_projections

COSTS = ("kv_bytes", "parameters", "attention_flops")
LOSS, MEMORY = "loss", "memory"
_MEMORY = ("gib", "tokens", "batch")
VALID = (
    "{kv_bytes: 0.5}, with one or several of kv_bytes, parameters, attention_flops (a share up to "
    "1, or an absolute number), memory: {gib: 24, tokens: 32768, batch: 8} and loss: +1%"
)


@dataclass(frozen=True)
class Scale:
    """What costs are counted for.

    Attributes:
        tokens: length of a sequence.
        value_bytes: of a cached value, and of a parameter.
        parameters: of the whole model as it is.
    """

    tokens: int
    value_bytes: int
    parameters: int


@dataclass(frozen=True)
class Bound:
    """At most so much of one cost, over all layers.

    Attributes:
        name: the key in `target`.
        most: the bound, in the cost's own unit.
        fixed: what no layer changes.
        count: what one layer adds: the site as it is, and as it will be; ``None`` if its attention
            is removed.
    """

    name: str
    most: float
    fixed: float
    count: Callable[[Site, Site | None], float]

    def count_all(self, sites: Sequence[Site], afters: Sequence[Site | None]) -> float:
        pairs = zip(sites, afters, strict=True)
        return self.fixed + sum(self.count(site, after) for site, after in pairs)


@dataclass(frozen=True)
class Target:
    """A parsed `target`.

    Attributes:
        costs: `COSTS` name → share up to 1, or absolute number.
        memory: ``gib``, ``tokens``, ``batch``; ``None`` if there is no such bound.
        loss: what may be lost, as a share of the original's; ``None`` if as little as possible is.
    """

    costs: Mapping[str, float]
    memory: Mapping[str, float] | None
    loss: float | None

    def make_bounds(self, sites: Sequence[Site], scale: Scale) -> list[Bound]:
        """Make the bounds for a model with these sites; at least one, which may bound nothing.

        The first is what is saved where `loss` is given.
        """
        bounds = []
        for name, given in self.costs.items():
            bound = _make_bound(name, sites, scale)
            most = given * bound.count_all(sites, sites) if given <= 1 else given
            bounds.append(replace(bound, most=most))
        if self.memory is not None:
            bounds.append(_make_memory_bound(self.memory, sites, scale))
        if not bounds:
            bound = _make_bound(COSTS[0], sites, scale)
            bounds.append(replace(bound, most=bound.count_all(sites, sites)))
        return bounds


def parse_target(given: Any, key: str) -> Target:
    """Parse `target`.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(key, "must say what the model may cost", given=repr(given), valid=VALID)
    for name in given:
        if name not in (*COSTS, MEMORY, LOSS):
            raise ConfigError(f"{key}.{name}", "unknown key", valid=[*COSTS, MEMORY, LOSS])
    costs = {}
    for name in COSTS:
        if name in given:
            costs[name] = _parse_positive(given[name], f"{key}.{name}")
    memory = given.get(MEMORY)
    if memory is not None:
        if not isinstance(memory, Mapping) or set(memory) != set(_MEMORY):
            raise ConfigError(
                f"{key}.{MEMORY}",
                f"needs exactly {', '.join(_MEMORY)}",
                given=repr(memory),
                valid="{gib: 24, tokens: 32768, batch: 8}",
            )
        memory = {n: _parse_positive(memory[n], f"{key}.{MEMORY}.{n}") for n in _MEMORY}
    loss = given.get(LOSS)
    return Target(costs, memory, None if loss is None else _parse_loss(loss, f"{key}.{LOSS}"))


def _parse_positive(given: Any, key: str) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e30:
        raise ConfigError(
            key, "must be above 0", given=repr(given), valid="a share up to 1, or a number above 1"
        )
    return float(given)


def _parse_loss(given: Any, key: str) -> float:
    text = str(given).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if isinstance(given, bool) or not 0 < share <= 10:
        raise ConfigError(key, "must be what may be lost", given=repr(given), valid="+1%, or 0.01")
    return share


def _make_bound(name: str, sites: Sequence[Site], scale: Scale) -> Bound:
    def count_cache(_: Site, after: Site | None) -> float:
        return count_kv_bytes([after] if after else [], scale.tokens, scale.value_bytes)

    def count_flops(_: Site, after: Site | None) -> float:
        return count_attention_flops([after] if after else [], scale.tokens)

    if name == "kv_bytes":
        return Bound(name, 0.0, 0.0, count_cache)
    if name == "attention_flops":
        return Bound(name, 0.0, 0.0, count_flops)
    return Bound(name, 0.0, _count_rest(sites, scale), _count_own)


def _count_own(site: Site, after: Site | None) -> float:
    """Count parameters; of removed attention the output's bias is left."""
    return site.hidden_size * site.output.bias if after is None else count_projections(after)


def _count_rest(sites: Sequence[Site], scale: Scale) -> float:
    return scale.parameters - sum(map(count_projections, sites))


def _make_memory_bound(memory: Mapping[str, float], sites: Sequence[Site], scale: Scale) -> Bound:
    """Weights and the cache of a batch of sequences: what serving holds at least."""

    def count(site: Site, after: Site | None) -> float:
        cache = count_kv_bytes([after] if after else [], int(memory["tokens"]), scale.value_bytes)
        return _count_own(site, after) * scale.value_bytes + memory["batch"] * cache

    most, rest = memory["gib"] * 2**30, _count_rest(sites, scale) * scale.value_bytes
    return Bound(MEMORY, most, rest, count)
