"""The search: score, pick, put in place, measure, and score again beside what was picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.calibration.case import Case
from surgery.calibration.layer_choices import UNCHANGED, Key, Walk, Walker
from surgery.console import say, track_progress
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.fit_budget.programme import Numbers, Picked, choose
from surgery.operations.fit_budget.target import LOSS, Bound, Target
from surgery.plan.choice import Choice, Chosen
from surgery.plan.operation import Operation

# How often less is allowed, because losses of layers do not add up.
_TIGHTENED = 4


@dataclass(frozen=True)
class Candidate:
    """One choice per layer, and what it costs.

    Attributes:
        whole: KL divergence in nats per prediction, measured with all layers changed.
        predicted: the same as the sum of what each layer costs.
    """

    picked: Picked
    whole: float
    predicted: float


class Search:
    """Finds what each layer becomes.

    Args:
        operations: what may be chosen.
        sites: of the layers that may change.
        offered: per site, what it may become.
        bounds: on costs; the first one is saved on where `target` says what may be lost.
        key: config key of the target.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        sites: Sequence[Site],
        offered: Sequence[Sequence[Choice]],
        target: Target,
        bounds: Sequence[Bound],
        case: Case,
        key: str,
    ) -> None:
        self.operations, self.sites, self.key = operations, sites, key
        self.target, self.bounds = target, bounds
        self.afters = [
            {UNCHANGED: site, **{choice.key: choice.after for choice in choices}}
            for site, choices in zip(sites, offered, strict=True)
        ]
        self.count = sum(map(len, offered))
        compared = min(case.options.budget_batches, len(case.batches) // 2)
        keys = [set(found) - {UNCHANGED} for found in self.afters]
        self.walker = Walker(
            case.model, sites, operations, keys, case.batches, case.options, compared
        )
        self.allowed: float | None = None
        self._measured: dict[tuple[Key, ...], float] = {}

    def run(
        self,
        *,
        uniform: bool,
        rounds: int,
        front: Sequence[float] = (),
        scores: Sequence[Mapping[Key, float]] | None = None,
    ) -> Chosen:
        """Search.

        Args:
            uniform: whether all layers become the same.
            rounds: how often all choices are scored again.
            front: shares of the first cost; the best of each is found from the same scores.
            scores: per layer, choice → divergence with that layer alone changed, if it is known.

        Raises:
            ConfigError: nothing meets the target.
        """
        if self.target.loss is not None:
            self.allowed = self.target.loss * self.walker.measure_entropy()
        nothing = Candidate([UNCHANGED] * len(self.sites), 0.0, 0.0)
        losses = self._score(nothing, "what each layer may become") if scores is None else scores
        best = self._pick(losses, nothing, self.bounds, self.allowed, uniform=uniform)
        if best is None:
            raise self._explain()
        tried = [best]
        if not uniform:
            # Losses of layers add up only nearly, so the best of those that are all alike may win.
            same = self._pick(losses, nothing, self.bounds, self.allowed, uniform=True)
            tried += [] if same is None else [same]
            for number in range(1, rounds + 1):
                best = min(tried, key=self._rank)
                self._put(best.picked)
                again = self._score(best, f"scored again beside what was picked, {number}")
                found = self._pick(again, best, self.bounds, self.allowed, uniform=False)
                if found is None or found.picked in [one.picked for one in tried]:
                    break
                tried.append(found)
        best = min(tried, key=self._rank)
        points = [self._find_point(losses, nothing, share, uniform) for share in front]
        choices = self._put(best.picked).choices
        self._say(best)
        figures = self._describe(best, tried, losses)
        if points:
            figures["front"] = points
        return Chosen(tuple(self._join(best, choices)), figures)

    def _put(self, picked: Picked) -> Walk:
        changed = sum(key != UNCHANGED for key in picked)
        with track_progress("layers, as they were picked", changed) as steps:

            def advance(site: Site, name: str) -> None:
                if (site.layer, name) in wanted:
                    steps.describe(f"layers, as they were picked: {site.layer}, {name}")
                    steps.advance()

            wanted = {(s.layer, name) for s, (_, name) in zip(self.sites, picked, strict=True)}
            return self.walker.put(picked, advance)

    def _score(self, beside: Candidate, what: str) -> list[dict[Key, float]]:
        with track_progress(f"layers, {what}", self.count) as steps:

            def advance(site: Site, name: str) -> None:
                steps.describe(f"layer {site.layer}, {name}")
                steps.advance()

            return self.walker.score(beside.picked, advance).losses

    def _measure(self, picked: Picked) -> float:
        """Measure the divergence of the whole model; once for each."""
        if tuple(picked) not in self._measured:
            self._measured[tuple(picked)] = self._put(picked).whole
        return self._measured[tuple(picked)]

    def _pick(
        self,
        losses: Sequence[Mapping[Key, float]],
        beside: Candidate,
        bounds: Sequence[Bound],
        allowed: float | None,
        *,
        uniform: bool,
    ) -> Candidate | None:
        """Pick by scores, and measure what was picked; ``None`` if nothing is within the bounds.

        Where a loss is the target, less is allowed until what is measured is within it.

        Args:
            losses: per layer, choice → divergence beside all others.
            beside: what all other layers were.
            allowed: divergence of the whole model; ``None``: as little as possible.
        """
        losses = [
            {key: loss - found[now] for key, loss in found.items()}
            for found, now in zip(losses, beside.picked, strict=True)
        ]
        costs = [self._list_costs(bound) for bound in bounds]
        most = [bound.most - bound.fixed for bound in bounds]
        left = None if allowed is None else allowed - beside.whole
        for _ in range(_TIGHTENED):
            if left is None:
                picked = choose(losses, costs, most, uniform=uniform)
            else:
                saved = self._list_costs(self.bounds[0])
                picked = choose(saved, [*costs, losses], [*most, left], uniform=uniform)
            if picked is None:
                return None
            added = sum(found[key] for found, key in zip(losses, picked, strict=True))
            whole = self._measure(picked)
            if allowed is None or whole <= allowed:
                return Candidate(picked, whole, beside.whole + added)
            left = (left or 0.0) - (whole - allowed)
        return None

    def _find_point(
        self,
        losses: Sequence[Mapping[Key, float]],
        nothing: Candidate,
        share: float,
        uniform: bool,
    ) -> dict[str, Any]:
        """Find the best for a share of the first cost; and the best that is all alike."""
        bound = self.bounds[0]
        within = [replace(bound, most=share * bound.count_all(self.sites, self.sites))]
        # The front is about this one cost, whatever may be lost.
        found = [
            self._pick(losses, nothing, within, None, uniform=alike)
            for alike in ((True,) if uniform else (False, True))
        ]
        best = min((one for one in found if one), key=lambda one: one.whole, default=None)
        alike = found[-1]
        return {
            "cost": bound.name,
            "share": share,
            "kl": None if best is None else best.whole,
            "uniform_kl": None if alike is None else alike.whole,
            "is": None if best is None else self._count(bound, best.picked),
            "layers": [] if best is None else self._list_layers(best),
        }

    def _explain(self) -> ConfigError:
        given = {bound.name: bound.most for bound in self.bounds}
        if self.allowed is None:
            return ConfigError(
                self.key,
                "no choice of one for each layer meets all of it",
                given=given,
                valid="a larger share, more choices, or uniform=false",
            )
        return ConfigError(
            f"{self.key}.{LOSS}",
            "cannot be kept to within the other bounds",
            given=f"{self.target.loss:.3g} of the original's loss",
            valid="more of it, or larger bounds",
        )

    def _list_costs(self, bound: Bound) -> Numbers:
        return [
            {key: bound.count(site, after) for key, after in found.items()}
            for site, found in zip(self.sites, self.afters, strict=True)
        ]

    def _count(self, bound: Bound, picked: Sequence[Key]) -> float:
        afters = [found[key] for found, key in zip(self.afters, picked, strict=True)]
        return bound.count_all(self.sites, afters)

    def _rank(self, candidate: Candidate) -> tuple[float, float]:
        if self.allowed is None:
            return candidate.whole, 0.0
        return self._count(self.bounds[0], candidate.picked), candidate.whole

    def _join(self, best: Candidate, choices: Sequence[dict[Key, Choice]]) -> list[Operation]:
        joined = []
        for operation in self.operations:
            chosen = {
                site.layer: found[key]
                for site, key, found in zip(self.sites, best.picked, choices, strict=True)
                if key[0] == operation.name
            }
            if chosen:
                joined.append(operation.join_choices(chosen))
        return joined

    def _say(self, best: Candidate) -> None:
        counts: dict[str, list[int]] = {}
        for site, (_, name) in zip(self.sites, best.picked, strict=True):
            counts.setdefault(name, []).append(site.layer)
        for name, layers in counts.items():
            say(f"  fit_budget: {name}: layers {', '.join(map(str, layers))}")
        kl = f"KL from the original {best.whole:.4f} nats per prediction"
        say(f"  fit_budget: {kl}, before the last gradient steps")

    def _list_layers(self, candidate: Candidate) -> list[dict[str, Any]]:
        return [
            {"layer": site.layer, "operation": operation, "choice": name}
            for site, (operation, name) in zip(self.sites, candidate.picked, strict=True)
        ]

    def _describe(
        self,
        best: Candidate,
        tried: Sequence[Candidate],
        scores: Sequence[Mapping[Key, float]],
    ) -> dict[str, Any]:
        return {
            "kl": best.whole,
            "heads": [[site.q_heads, site.kv_heads] for site in self.sites],
            "allowed": self.allowed,
            "bounds": {
                bound.name: {"most": bound.most, "is": self._count(bound, best.picked)}
                for bound in self.bounds
            },
            "layers": self._list_layers(best),
            "tried": [{"kl": one.whole, "predicted": one.predicted} for one in tried],
            "scores": [
                {
                    "layer": site.layer,
                    "choices": [
                        {"operation": operation, "choice": name, "kl": loss}
                        for (operation, name), loss in losses.items()
                    ],
                }
                for site, losses in zip(self.sites, scores, strict=True)
            ],
        }
