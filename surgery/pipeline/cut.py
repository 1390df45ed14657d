"""What follows the stage `train`: perform what training decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery.execute.live import apply_, apply_transient_
from surgery.pipeline.session import Session
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_specs, restore_saved_form_


def cut(session: Session, decision: Any) -> None:
    """Perform the deferred operation; `plan` then leads from the original to the result.

    Args:
        decision: what training decided.
    """
    operation, model = session.deferred, session.model
    assert operation is not None
    assert model is not None
    restore_saved_form_(model)
    last = operation.adopt_decision_on(session.plan.after, model, decision)
    model = apply_(model, make_plan(model, [last]))
    session.plan = _plan_all(session, operation.adopt_decision(decision))
    apply_transient_(model, session.plan)
    session.model = model


def _plan_all(session: Session, decided: Operation) -> Plan:
    """Plan from the original to the result, as if the decision had been known from the start."""
    early = session.plan
    plan = make_plan(
        session.source.build_meta_model(),
        [*parse_specs(early.operations), decided],
        resolutions=early.resolutions,
        calibration=early.calibration,
        **session.prepared.planning,
    )
    return replace(plan, notes=(*plan.notes, f"{decided.name}: decided in training"))
