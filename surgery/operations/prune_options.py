"""Options of `prune_heads` that cannot be, or cannot be together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import ConfigError
from surgery.importance.table import ESTIMATORS

if TYPE_CHECKING:
    from surgery.operations.prune_heads import PruneHeads

_FILE = 'a JSON file: {"scores": [[one number per head] per layer]}'
# Those that say how heads are chosen, and are of no use where `heads` says which.
_CHOOSING = ("scores", "estimator", "scope", "cut", "uniform", "protect", "schedule")


def check_options(spec: PruneHeads) -> None:
    """Raises: ConfigError, for the first thing that is wrong, whatever the model."""
    ways = {"heads": spec.heads, "amount": spec.amount, "count": spec.count}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "attention.prune_heads",
            "needs exactly one of heads, amount and count",
            given=", ".join(given) or "none of them",
        )
    if spec.estimator is not None and spec.estimator not in ESTIMATORS:
        raise ConfigError(
            spec.key("estimator"),
            "there is no such estimator",
            given=spec.estimator,
            valid=ESTIMATORS,
        )
    if spec.heads is not None:
        _refuse_choosing(spec)
    else:
        _check_scored(spec, given[0])
    if spec.amount is not None and not 0 <= spec.amount <= 1:
        raise ConfigError(spec.key("amount"), "must lie between 0 and 1", given=spec.amount)
    if spec.count is not None and spec.count < 0:
        raise ConfigError(spec.key("count"), "must not be negative", given=spec.count)
    if spec.uniform and spec.remove_attention:
        raise ConfigError(
            spec.key("uniform"),
            "a layer that loses its attention has no heads, and the others keep some",
            given=True,
            valid="false, or remove_attention: false",
        )
    _check_schedule(spec)


def _refuse_choosing(spec: PruneHeads) -> None:
    for name in _CHOOSING:
        value, default = getattr(spec, name), getattr(type(spec), name)
        if value != default:
            plain = getattr(default, "value", default)
            raise ConfigError(
                spec.key(name),
                f"{'are' if name == 'scores' else 'is'} of no use where `heads` says which",
                given=getattr(value, "value", value),
                valid={None: "null", False: "false"}.get(plain, plain),
            )


def _check_scored(spec: PruneHeads, way: str) -> None:
    if spec.scores is None and spec.estimator is None:
        raise ConfigError(
            spec.key("scores"),
            f"`{way}` needs a score for every head",
            valid=f"{_FILE}, or {spec.key('estimator')}: one of {', '.join(ESTIMATORS)}",
        )
    if spec.scores is not None and spec.estimator is not None:
        raise ConfigError(
            spec.key("estimator"),
            "is of no use beside `scores`, which are measured already",
            given=spec.estimator,
            valid="null",
        )


def _check_schedule(spec: PruneHeads) -> None:
    if spec.rounds < 1:
        raise ConfigError(spec.key("rounds"), "must be at least 1", given=spec.rounds)
    if not 0 < spec.until <= 1:
        raise ConfigError(spec.key("until"), "must lie above 0 and at most at 1", given=spec.until)
    if not spec.deferred:
        return
    schedule = f"schedule: {spec.schedule.value}"
    if spec.estimator is None:
        raise ConfigError(
            spec.key("estimator"),
            f"`{schedule}` scores heads while it trains",
            given="null",
            valid=ESTIMATORS,
        )
    if spec.refit:
        raise ConfigError(
            spec.key("refit"),
            f"is made before training, and heads go in the course of it under `{schedule}`",
            given=True,
            valid="false, or schedule: one_shot",
        )
