"""The options of `prune_heads`, which of them cannot be together, and the heads they choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from surgery.config.options import COUNT, NOT_NEGATIVE, SHARE, Range, option
from surgery.errors import ConfigError
from surgery.importance.choice import HeadCut, Heads, choose_heads, parse_head_lists
from surgery.importance.score_file import HeadScores, read_scores
from surgery.importance.table import ESTIMATORS, GROUPS, HEADS
from surgery.models.sites import Site
from surgery.plan.layers import LAYERS_HELP, keep_layers
from surgery.plan.operation import Operation

# Chooses heads by calibration, round after round: no scores that one could have beforehand.
ELIMINATION = "elimination"
_ESTIMATORS = (*ESTIMATORS, ELIMINATION)
_FILE = 'a JSON file: {"scores": [[one number per head] per layer]}'
# Options that say how heads are chosen. They have no effect where `heads` names the heads.
_CHOOSING = ("scores", "estimator", "scope", "cut", "uniform", "protect", "schedule")


# What an amount is counted over. (`global` is a keyword, so no class body can say it.)
Scope = Enum("Scope", {"layer": "layer", "global": "global"})


class Cut(Enum):
    """What is removed together where query heads share KV heads."""

    groups = "groups"
    queries = "queries"


class Schedule(Enum):
    """When heads go: before training, in rounds of it, or by gates that close during it."""

    one_shot = "one_shot"
    iterative = "iterative"
    gradual = "gradual"


@dataclass
class PruneOptions(Operation):
    """Options of `attention.prune_heads`.

    Attributes:
        heads: query heads to remove: one list for every chosen layer, or layer → list.
        amount: instead, the share of heads to remove, lowest scores first.
        count: instead, how many heads to remove: of each layer, or of all by `scope`.
        scores: a file with a score per layer and head, for `amount` and `count`.
        estimator: instead, who scores them when the plan is calibrated; see
            `surgery.importance.table.ESTIMATORS`. Or `ELIMINATION`, which refits too.
        scope: whether each layer loses as many, or the lowest of all layers go.
        uniform: whether every layer ends with as many heads.
        protect: query heads that stay, in the shapes of `heads`.
        cut: where query heads share KV heads: whole groups, KV head included, or as many query
            heads of each group. Explicit heads may be both.
        layers: sites to change, by number from 0; ``None`` for all.
        remove_attention: whether a site may lose all its heads, and with them its attention.
        refit: whether the output projection of each changed site is solved anew, so that the heads
            left make up for those that went; calibrated.
        schedule: see `Schedule`.
        rounds: of ``iterative``, and of ``elimination``.
        until: of ``iterative`` and ``gradual``: share of the training steps by which the heads
            are gone.
    """

    heads: Any = option(None, "[0,3] in every layer, or {0: [1,2], 5: [0]}")
    amount: float | None = option(
        None, "instead: the share of heads to remove, lowest scores first", range=SHARE
    )
    count: int | None = option(None, "or how many", range=NOT_NEGATIVE)
    scores: str | None = option(
        None, 'a score table, or {"scores": [[one per query head] per layer]}'
    )
    estimator: str | None = option(None, f"or measured here: {' | '.join(ESTIMATORS)}")
    scope: Scope = option(
        Scope.layer, "layer: each layer loses as many | global: the lowest of all layers go"
    )
    uniform: bool = option(
        False, "every layer ends with as many heads, so that a config can say it"
    )
    protect: Any = option(None, "heads that stay, in the shapes of `heads`")
    cut: Cut = option(
        Cut.groups, "with shared KV heads: whole groups | queries, as many of each group"
    )
    layers: list[int] | None = option(None, LAYERS_HELP)
    remove_attention: bool = option(
        False, "whether a layer may lose all its heads, and its attention with them"
    )
    refit: bool = option(
        False, "output projections solved anew, to make up for the heads that went"
    )
    schedule: Schedule = option(
        Schedule.one_shot,
        "one_shot: before training | iterative: in rounds | gradual: gates that close",
    )
    rounds: int = option(4, "iterative, elimination: how many", range=COUNT)
    until: float = option(
        0.5,
        "iterative, gradual: the heads are gone after this share of the steps",
        range=Range(0, 1, low_open=True),
    )

    def check_options(self) -> None:
        _check(self)

    @property
    def together(self) -> bool:
        """Whether the amount is counted over all layers."""
        return self.scope is Scope["global"]

    @property
    def unit(self) -> str:
        """What is scored: ``groups`` or ``heads``."""
        return GROUPS if self.cut is Cut.groups else HEADS

    @property
    def deferred(self) -> bool:
        """Whether training decides which heads go, and when; see `follow_training`."""
        return self.schedule is not Schedule.one_shot

    @property
    def eliminates(self) -> bool:
        """Whether heads go in rounds, each after the others have made up for it."""
        return self.estimator == ELIMINATION

    @property
    def refits(self) -> bool:
        """Whether output projections are solved anew."""
        return not self.deferred and (self.refit or self.eliminates)

    @property
    def scored_by(self) -> str | None:
        return None if self.eliminates else self.estimator

    @property
    def calibrated(self) -> bool:
        return not self.deferred and (self.estimator is not None or self.refit)

    def choose_by(self, sites: Sequence[Site], scores: HeadScores) -> dict[int, list[int]] | None:
        if self.heads is not None:
            return None
        return replace(self, scores=None).choose(keep_layers(sites, self.layers), scores)

    def choose(
        self, sites: Sequence[Site], scores: HeadScores | None = None, *, layers: int | None = None
    ) -> dict[int, list[int]]:
        """Choose the heads to remove of the chosen `sites`: layer → query heads, ascending.

        Args:
            scores: of these sites, for an estimator; a file's are read here.
            layers: how many layers the model has, which the file must be for; ``None``: not known.

        Raises:
            ConfigError: these heads cannot go.
        """
        if self.heads is not None:
            return parse_head_lists(self.heads, sites, self.get_key("heads"))
        if self.scores is not None:
            scores = read_scores(
                self.scores, sites, self.get_key("scores"), unit=self.unit, layers=layers
            )
        protected = self.parse_protected(sites)
        scores = scores or _make_even_scores(sites)
        removed = choose_heads(sites, scores, self.make_head_cut(), protected)
        if sites and (self.amount or self.count) and not any(removed.values()):
            raise self._explain_nothing(sites, protected)
        return removed

    def parse_protected(self, sites: Sequence[Site]) -> Heads:
        """Parse `protect`: layer → query heads that stay."""
        return parse_head_lists(self.protect or [], sites, self.get_key("protect"))

    def make_head_cut(self) -> HeadCut:
        """Say how many heads go, and how they are counted."""
        return HeadCut(
            self.amount,
            self.count,
            together=self.together,
            uniform=self.uniform,
            by_group=self.cut is Cut.groups,
            empty=self.remove_attention,
            prefix=f"attention.{self.name}",
            allow_empty=f"{self.get_key('remove_attention')}=true",
        )

    def _explain_nothing(self, sites: Sequence[Site], protected: Heads) -> ConfigError:
        """Make the error for an amount that rounds to no head at all."""
        by_group = self.cut is Cut.groups
        sizes = sorted({site.group_size if by_group else site.kv_heads for site in sites})
        together = " or ".join(map(str, sizes))
        unit = (
            f"{together} query heads share a KV head and go together"
            if by_group
            else f"{together} query heads go together, one of each KV group"
        )
        way = "amount" if self.count is None else "count"
        valid = [
            f"{self.get_key('cut')}={cut.value}"
            for cut in Cut
            if cut is not self.cut and self._removes_any(sites, protected, cut=cut)
        ]
        least = self._find_least(sites, protected)
        if least is not None:
            valid.insert(0, f"at least {least:.4g}")
        return ConfigError(
            self.get_key(way),
            f"removes nothing: {unit}, and this is too little for any",
            given=self.amount if self.count is None else self.count,
            valid=" or ".join(valid) or "0: no head of these layers can go",
        )

    def _find_least(self, sites: Sequence[Site], protected: Heads) -> float | None:
        """Find the least amount (or count) that is exactly one cut; ``None`` if none can be."""
        moves = [site.group_size if self.cut is Cut.groups else site.kv_heads for site in sites]
        heads = [site.q_heads for site in sites]
        if self.together:
            one = sum(moves) if self.uniform else min(moves)
            found = [one if self.count is not None else one / sum(heads)]
        elif self.count is not None:
            found = sorted(moves)
        else:
            found = sorted(move / of for move, of in zip(moves, heads, strict=True))
        for number in found:
            given = {"count": int(number)} if self.count is not None else {"amount": number}
            if self._removes_any(sites, protected, **given):
                return number
        return None

    def _removes_any(self, sites: Sequence[Site], protected: Heads, **options: Any) -> bool:
        wanted = replace(self, **options).make_head_cut()
        try:
            return any(choose_heads(sites, _make_even_scores(sites), wanted, protected).values())
        except ConfigError:
            return False


def _make_even_scores(sites: Sequence[Site]) -> HeadScores:
    """Make scores by which every layer loses as many, its first heads first."""
    return HeadScores(
        {site.layer: [head % site.group_size for head in range(site.q_heads)] for site in sites},
        {site.layer: list(range(site.kv_heads)) for site in sites},
    )


def _check(spec: PruneOptions) -> None:
    """Raises: ConfigError, for the first thing that is wrong, whatever the model."""
    ways = {"heads": spec.heads, "amount": spec.amount, "count": spec.count}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"attention.{spec.name}",
            "needs exactly one of heads, amount and count",
            given=", ".join(given) or "none of them",
        )
    if spec.eliminates and spec.deferred:
        raise ConfigError(
            spec.get_key("estimator"),
            f"`{ELIMINATION}` takes place before training, and `schedule: {spec.schedule.value}` "
            "removes heads during training",
            given=spec.estimator,
            valid=f"schedule: one_shot, or one of {', '.join(ESTIMATORS)}",
        )
    if spec.estimator is not None and spec.estimator not in _ESTIMATORS:
        raise ConfigError(
            spec.get_key("estimator"),
            "there is no such estimator",
            given=spec.estimator,
            valid=_ESTIMATORS,
        )
    if spec.heads is not None:
        _refuse_choosing(spec)
    else:
        _check_scored(spec, given[0])
    if spec.uniform and spec.remove_attention:
        raise ConfigError(
            spec.get_key("uniform"),
            "a layer that loses its attention has no heads, and the others keep some",
            given=True,
            valid="false, or remove_attention: false",
        )
    _check_schedule(spec)


def _refuse_choosing(spec: PruneOptions) -> None:
    for name in _CHOOSING:
        value, default = getattr(spec, name), getattr(type(spec), name)
        if value != default:
            plain = getattr(default, "value", default)
            raise ConfigError(
                spec.get_key(name),
                f"{'have' if name == 'scores' else 'has'} no effect where `heads` names the heads",
                given=getattr(value, "value", value),
                valid={None: "null", False: "false"}.get(plain, plain),
            )


def _check_scored(spec: PruneOptions, way: str) -> None:
    if spec.scores is None and spec.estimator is None:
        raise ConfigError(
            spec.get_key("scores"),
            f"`{way}` needs a score for every head",
            valid=f"{_FILE}, or {spec.get_key('estimator')}: one of {', '.join(_ESTIMATORS)}",
        )
    if spec.scores is not None and spec.estimator is not None:
        raise ConfigError(
            spec.get_key("estimator"),
            "has no effect beside `scores`, which are measured already",
            given=spec.estimator,
            valid="null",
        )


def _check_schedule(spec: PruneOptions) -> None:
    if not spec.deferred:
        return
    schedule = f"schedule: {spec.schedule.value}"
    if spec.estimator is None:
        raise ConfigError(
            spec.get_key("estimator"),
            f"`{schedule}` scores heads while it trains",
            given="null",
            valid=ESTIMATORS,
        )
    if spec.refit:
        raise ConfigError(
            spec.get_key("refit"),
            f"takes place before training, and `{schedule}` removes heads during training",
            given=True,
            valid="false, or schedule: one_shot",
        )
