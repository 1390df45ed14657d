"""An operation that training decides on, and that is performed when training is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.config.schema import ExportFormat, RunConfig
from surgery.execute.live import apply_, apply_transient_
from surgery.plan.make import check_order, make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations, parse_specs, restore_saved_form_

if TYPE_CHECKING:
    from surgery.pipeline.session import Session


@dataclass
class Deferred:
    """What is left to training.

    Attributes:
        operation: the one that training decides on.
        expected: the whole plan, from the original on, with what the decision may be assumed: its
            sizes are right, the heads themselves need not be.
        decision: what training decided; ``None`` before it has.
    """

    operation: Operation
    expected: Plan
    decision: Any = None


def split_deferred(operations: Sequence[Operation]) -> tuple[list[Operation], Operation | None]:
    """The operations that are performed before training, and the one that training decides on.

    Raises:
        ConfigError: others come after that one.
    """
    check_order(operations)
    if operations and operations[-1].deferred:
        return list(operations[:-1]), operations[-1]
    return list(operations), None


def immediate_operations(run: RunConfig) -> list[Operation]:
    """The operations of `attention.*` that are performed before training."""
    return split_deferred(parse_operations(run.attention))[0]


def perform_deferred(session: Session) -> None:
    """Perform what training decided; `session.plan` then leads from the original to the result."""
    deferred, model = session.deferred, session.model
    assert deferred is not None
    assert model is not None
    restore_saved_form_(model)
    last = deferred.operation.decided_on(session.plan.after, model, deferred.decision)
    model = apply_(model, make_plan(model, [last]))
    session.plan = plan_whole(session, deferred)
    session.deferred = None
    apply_transient_(model, session.plan)
    session.model = model


def plan_whole(session: Session, deferred: Deferred) -> Plan:
    """From the original to the result, as if it had been known from the start what is decided."""
    early, operation = session.plan, deferred.operation
    plan = make_plan(
        session.source.build_meta_model(),
        [*parse_specs(early.operations), operation.decided(deferred.decision)],
        name=session.source.name,
        seed=session.run.seed,
        tokens=early.tokens,
        kv_bytes=early.kv_bytes,
        device=str(session.device),
        native=session.run.export.format is ExportFormat.native,
        resolutions=early.resolutions,
        calibration=early.calibration,
    )
    return replace(plan, notes=(*plan.notes, f"{operation.name}: decided in training"))
