"""The operation `fit_budget`: other operations, chosen layer by layer so that a target is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from transformers import PreTrainedModel

from surgery.calibration.divergence import predicts
from surgery.calibration.refusals import refuse_repeated, refuse_shared
from surgery.config.options import NOT_NEGATIVE, Range, option
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.fit_budget.score_file import read_scores
from surgery.operations.fit_budget.search import Search
from surgery.operations.fit_budget.target import COSTS, VALID, Bound, Scale, Target, parse_target
from surgery.plan.choice import Choice, Chosen
from surgery.plan.draft import Draft
from surgery.plan.layers import LAYERS_HELP, keep_layers, select_sites
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation, Outcome, Position
from surgery.plan.registry import find_operations, parse_operations

# Of windows: fewer say too little of which layer is dearer.
_LEAST_BATCHES = 2


@dataclass
class FitBudget(Operation):
    """Other operations, chosen layer by layer so that a target is met at the least loss.

    Every choice of every layer is scored by what it alone costs the predictions; an integer
    programme picks one per layer (Puzzle, arXiv:2411.19146), and its neighbourhood is scored again.

    Attributes:
        target: what the model may cost, and what it may lose.
        choices: names of the operations that may be used, or name → options; ``None``: all that
            can be searched over.
        uniform: whether all layers become the same, so that a config can say it.
        rounds: how often the choices are scored again beside those that were picked.
        front: shares of the first cost in `target`; the best for each is found from the same
            scores, and measured, for the report.
        scores: the plan.json of an earlier run of this model, whose scores are used.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "fit_budget"
    position = Position.FIRST

    target: Any = option(
        MISSING, "what the model may cost: {kv_bytes: 0.5}; and lose: {loss: +1%}", valid=VALID
    )
    choices: Any = option(None, "names of the operations that may be used; null for all")
    uniform: bool = option(False, "all layers become the same, so that a config can say it")
    rounds: int = option(1, "how often choices are scored again", range=NOT_NEGATIVE)
    front: list[float] | None = option(
        None,
        "[0.25, 0.5]: shares of the first cost that are tried, too",
        range=Range(0, 1, low_open=True),
    )
    scores: str | None = option(None, "the plan.json of an earlier run, whose scores are used")
    layers: list[int] | None = option(None, LAYERS_HELP)

    def check_options(self) -> None:
        self.parse_target()
        self.make_operations()

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def chooses(self) -> bool:
        return True

    def parse_target(self) -> Target:
        return parse_target(self.target, self.get_key("target"))

    def make_operations(self) -> list[Operation]:
        """Make the operations that may be used, with the options that they are searched with.

        Raises:
            ConfigError: there is no such operation, or it cannot be searched over.
        """
        known = {n: kind for n, kind in find_operations().items() if kind.searched is not None}
        given = self.choices
        if given is None:
            given = list(known)
        names = list(given) if isinstance(given, (list, tuple, Mapping)) else []
        if not names or any(name not in known for name in names):
            raise ConfigError(
                self.get_key("choices"),
                "must name operations that can be searched over layer by layer",
                given=repr(given),
                valid=list(known),
            )
        more = given if isinstance(given, Mapping) else {}
        specs = {name: {**(known[name].searched or {}), **(more.get(name) or {})} for name in names}
        return parse_operations(specs)

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        context = draft.context
        if context.native and not self.uniform and len(sites) > 1:
            raise ConfigError(
                self.get_key("uniform"),
                "layers may become different, which no config of the architecture can say",
                given=False,
                valid="true, or another export.format",
            )
        offered, refused = self.list_offers(draft.model, sites)
        draft.notes += [
            f"fit_budget: {name} cannot be used: {why}" for name, why in refused.items()
        ]
        scale = Scale(context.tokens, context.value_bytes, _count_parameters(draft.model))
        if self.scores is not None:
            read_scores(self.scores, sites, offered, self.get_key("scores"))
        self._refuse_out_of_reach(self.parse_target().make_bounds(sites, scale), sites, offered)
        draft.open_decisions.append(
            f"fit_budget: what becomes of each layer, for {self.target} (sizes and export still "
            "those of the original)"
        )

    def describe(self, outcome: Outcome) -> str:
        return "chosen by calibration"

    def list_offers(
        self, model: PreTrainedModel, sites: Sequence[Site]
    ) -> tuple[list[list[Choice]], dict[str, str]]:
        """List what each layer may become, without data.

        Returns:
            per site, what can be planned; and operation → why it cannot do anything to this model.

        Raises:
            ConfigError: none can, or none of one that `choices` names.
        """
        offered: list[list[Choice]] = [[] for _ in sites]
        refused: dict[str, str] = {}
        for operation in self.make_operations():
            found = [operation.list_choices(site) for site in sites]
            reasons, kept = _find_refusals(model, operation, sites, found), 0
            for own, choices in zip(offered, found, strict=True):
                left = [choice for choice in choices if choice.key not in reasons]
                own += left
                kept += len(left)
            if not kept:
                why = next(iter(reasons.values()), "no layer has heads that it could take")
                refused[operation.name] = why
        if not any(offered) or (self.choices is not None and refused):
            name, why = next(iter(refused.items()))
            raise ConfigError(
                self.get_key("choices"),
                f"{name} can do nothing to a layer of this model: {why}",
                given=[operation.name for operation in self.make_operations()],
            )
        return offered, refused

    def _refuse_out_of_reach(
        self, bounds: Sequence[Bound], sites: Sequence[Site], offered: Sequence[Sequence[Choice]]
    ) -> None:
        """Check that each bound, by itself, can be met.

        Raises:
            ConfigError: one cannot; it names the least that can.
        """
        for bound in bounds:
            whole, least = bound.count_all(sites, sites), bound.fixed
            if not whole:
                raise ConfigError(
                    f"{self.get_key('target')}.{bound.name}",
                    "there is none of it in this model",
                    given=self.target[bound.name],
                    valid=[name for name in COSTS if name != bound.name],
                )
            for site, choices in zip(sites, offered, strict=True):
                afters = (site, *(choice.after for choice in choices))
                least += min(bound.count(site, after) for after in afters)
            if least > bound.most * (1 + 1e-9):
                raise ConfigError(
                    f"{self.get_key('target')}.{bound.name}",
                    "cannot be reached with these choices",
                    given=self.target[bound.name],
                    valid=f"at least {least / whole:.3g} of what it is, which is {least:.4g}",
                )

    def choose_operations(self, case: Any) -> Chosen:
        sites = keep_layers(case.sites, self.layers)
        self._check_case(case, sites)
        scale = Scale(case.tokens, case.value_bytes, _count_parameters(case.model))
        target, key = self.parse_target(), self.get_key("target")
        bounds = target.make_bounds(sites, scale)
        offered, _ = self.list_offers(case.model, sites)
        search = Search(self.make_operations(), sites, offered, target, bounds, case, key)
        scores = None
        if self.scores is not None:
            scores = read_scores(self.scores, sites, offered, self.get_key("scores"))
        return search.run(
            uniform=self.uniform, rounds=self.rounds, front=self.front or (), scores=scores
        )

    def _check_case(self, case: Any, sites: Sequence[Site]) -> None:
        if not predicts(case.model, case.batches[0]):
            raise ConfigError(
                f"attention.{self.name}",
                f"compares predictions, and a {type(case.model).__name__} returns no logits",
            )
        if len(case.batches) < _LEAST_BATCHES:
            raise ConfigError(
                "calibration.windows",
                "the text is too short to score choices on other text than they are fitted to",
                given=f"{len(case.batches)} batch",
                valid=f"at least {_LEAST_BATCHES} batches of calibration.batch_size windows",
            )
        refuse_shared(case.model, sites)
        refuse_repeated(case.model, sites, case.batches[0])


def _count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _find_refusals(
    model: PreTrainedModel,
    operation: Operation,
    sites: Sequence[Site],
    found: Sequence[Sequence[Choice]],
) -> dict[tuple[str, str], str]:
    """Find the choices that cannot be planned, each tried on one layer that has it; and why."""
    reasons: dict[tuple[str, str], str] = {}
    tried: set[tuple[str, str]] = set()
    for site, choices in zip(sites, found, strict=True):
        for choice in choices:
            if choice.key in tried:
                continue
            tried.add(choice.key)
            try:
                make_plan(model, [operation.join_choices({site.layer: choice})])
            except ConfigError as error:
                reasons[choice.key] = error.problem
    return reasons
