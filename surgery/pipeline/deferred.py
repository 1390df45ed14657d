"""An operation that training decides on: heads closed by gates, and cut when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.config.schema import ExportFormat, RunConfig, Stage, Trained
from surgery.errors import ConfigError
from surgery.execute.live import FUSE
from surgery.execute.steps import run_step
from surgery.operations import parse_operations
from surgery.operations.head_lists import Heads
from surgery.operations.prune_heads import PruneHeads
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan

if TYPE_CHECKING:
    from surgery.pipeline.session import Session


@dataclass
class Deferred:
    """What is left to training.

    Attributes:
        operation: `attention.prune_heads` on a schedule.
        expected: the whole plan, from the original on, with heads assumed: its counts are right,
            the heads themselves need not be.
        closed: layer → heads that training closed; ``None`` before it has.
    """

    operation: PruneHeads
    expected: Plan
    closed: Heads | None = None


def split(operations: Sequence[Operation]) -> tuple[list[Operation], PruneHeads | None]:
    """The operations that are performed before training, and the one that training decides on.

    Raises:
        ConfigError: others come after that one.
    """
    for number, operation in enumerate(operations):
        if not isinstance(operation, PruneHeads) or not operation.deferred:
            continue
        if number < len(operations) - 1:
            names = [one.name for one in operations]
            last = [name for name in names if name != operation.name] + [operation.name]
            raise ConfigError(
                "attention",
                f"{operation.name} with schedule={operation.schedule.value} must come last: its "
                "heads are cut after training",
                given=", ".join(names),
                valid=", ".join(last),
            )
        return list(operations[:number]), operation
    return list(operations), None


def performed(run: RunConfig) -> list[Operation]:
    """The operations of `attention.*` that are performed before training."""
    return split(parse_operations(run.attention))[0]


def check_deferred(run: RunConfig, operation: PruneHeads) -> None:
    """Refuse a run that cannot close heads while it trains.

    Raises:
        ConfigError: no training, a strategy that shards the model, more rounds than steps, or
            `optim.parameters` that only the cut could tell.
    """
    key = operation.key("schedule")
    if Stage.operate in run.stages and Stage.train not in run.stages:
        raise ConfigError(
            "stages",
            f"{key}={operation.schedule.value} closes heads while the model trains",
            given=[stage.value for stage in run.stages],
            valid=f"add `train`, or {key}=one_shot",
        )
    if Stage.train not in run.stages:
        return
    from surgery.training.gating import refused_strategy
    from surgery.training.pruning_schedule import PruningSchedule

    strategy = str(run.trainer.get("strategy"))
    if strategy.startswith(("fsdp", "deepspeed")):
        raise refused_strategy(operation, strategy)
    steps = run.trainer.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        PruningSchedule.of(operation, steps)
    if run.optim.parameters is Trained.changed:
        raise ConfigError(
            "optim.parameters",
            f"which tensors {key}={operation.schedule.value} changes is decided while they train",
            given=Trained.changed.value,
            valid="all, attention, output",
        )


def cut(session: Session) -> None:
    """Remove the heads that training closed; the plan becomes the one that does all of it.

    `session.plan` then leads from the original to the result, with the heads by number.
    """
    from surgery.training.cut import cut_closed_

    deferred, model = session.deferred, session.model
    assert deferred is not None
    assert deferred.closed is not None
    assert model is not None
    model = cut_closed_(model, session.plan.after, deferred.operation, deferred.closed)
    session.plan = whole_plan(session, deferred.closed)
    session.deferred = None
    for step in session.plan.steps:
        if step.kind == FUSE:
            run_step(step.kind, model, step.arguments)
    session.model = model


def whole_plan(session: Session, closed: Heads) -> Plan:
    """From the original to the result, as if it had been known from the start which heads go."""
    assert session.deferred is not None
    early, operation = session.plan, session.deferred.operation
    plan = make_plan(
        session.source.skeleton(),
        [*_resolved(early), operation.decided(closed)],
        name=session.source.name,
        seed=session.run.seed,
        tokens=early.tokens,
        kv_bytes=early.kv_bytes,
        device=str(session.device),
        native=session.run.export.format is ExportFormat.native,
        resolutions=early.resolutions,
        calibration=early.calibration,
    )
    note = (
        f"prune_heads: which heads go was decided in training, by {operation.estimator} "
        f"({operation.schedule.value})"
    )
    return replace(plan, notes=(*plan.notes, note))


def _resolved(plan: Plan) -> list[Operation]:
    """The operations of a plan as calibration left them."""
    specs = {str(spec["operation"]): dict(spec) for spec in plan.operations}
    for spec in specs.values():
        del spec["operation"]
    return parse_operations(specs)
