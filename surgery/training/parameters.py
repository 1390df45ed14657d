"""Which parameters are trained: all, those of attention, its outputs, or those surgery made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from surgery.config.schema import Trained
from surgery.errors import ConfigError
from surgery.plan.draft import Step
from surgery.plan.plan import Plan
from surgery.plan.registry import get_operation

_KEY = "optim.parameters"


def check_parameters(plan: Plan, choice: Trained) -> None:
    """Refuse a choice that leaves nothing to train, or that no tensor boundary follows.

    Raises:
        ConfigError: key ``optim.parameters``.
    """
    if choice in (Trained.attention, Trained.output) and not plan.after:
        raise ConfigError(
            _KEY, "the model has no attention left to train", given=choice.value, valid="all"
        )
    if choice is not Trained.changed:
        return
    if not list_changed_names(plan) and not plan.open_decisions:
        raise ConfigError(
            _KEY,
            "no operation of this run changes a tensor that is left",
            given=choice.value,
            valid="all, attention, or attention=[…] with an operation that edits tensors",
        )
    for step in plan.steps:
        tensor = _find_mixed(step, set(list_changed_names(plan)))
        if tensor is not None:
            raise ConfigError(
                _KEY,
                f"{step.operation} joins {tensor} with others, of which only some were changed",
                given=choice.value,
                valid=f"all, attention, or a list of operations without {step.operation}",
            )


def select_frozen(model: nn.Module, plan: Plan, choice: Trained) -> list[nn.Parameter]:
    """Select the parameters of an operated model that `choice` leaves untrained.

    output: all but the output projections of all sites, biases included.
    attention: all but the query, key, value and output projections and QK-norms of all sites.
    changed: all but the results of the plan's tensor edits, whatever was done to them later.
    A tensor in several places is frozen only if none of them is chosen.

    Raises:
        ConfigError: see `check_parameters`.
    """
    if choice is Trained.all:
        return []
    check_parameters(plan, choice)
    kept = {id(parameter) for parameter in _CHOSEN[choice](model, plan)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in kept]


def list_changed_names(plan: Plan) -> list[str]:
    """List the tensors of the result that edits made, without those of removed attention."""
    removed = tuple(f"{site.path}." for site in plan.removed)
    names = {spec.name: None for edit in plan.edits for spec in edit.results}
    return [name for name in names if not name.startswith(removed)]


def _iterate_attention(model: nn.Module, plan: Plan) -> Iterator[nn.Parameter]:
    for site in plan.after:
        parts = (site.query, site.key, site.value, site.output, site.q_norm, site.k_norm)
        for part in parts:
            if part is not None:
                yield from _find_holder(model, part.path).parameters()


def _iterate_output(model: nn.Module, plan: Plan) -> Iterator[nn.Parameter]:
    for site in plan.after:
        yield from _find_holder(model, site.output.path).parameters()


def _iterate_changed(model: nn.Module, plan: Plan) -> Iterator[nn.Parameter]:
    for name in list_changed_names(plan):
        path, _, attribute = name.rpartition(".")
        yield getattr(_find_holder(model, path), attribute)


_CHOSEN: dict[Trained, Callable[[nn.Module, Plan], Iterator[nn.Parameter]]] = {
    Trained.attention: _iterate_attention,
    Trained.output: _iterate_output,
    Trained.changed: _iterate_changed,
}


def _find_holder(model: nn.Module, path: str) -> nn.Module:
    """Find the module that holds the parameters of the one at `path`, which may be a part."""
    module = model.get_submodule(path)
    holder = getattr(module, "get_parameter_holder", None)
    return module if holder is None else holder()


def _find_mixed(step: Step, changed: set[str]) -> str | None:
    """Find a tensor that a step joins with others, some of them changed and some not."""
    for group in get_operation(step.operation).list_joined_tensors(step):
        if len({name in changed for name in group}) > 1:
            return group[0]
    return None
