"""A plan on disk: JSON for people and scripts, and its calibrated tensors beside it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgery.errors import PlanError
from surgery.files import read_json, write_json, write_whole
from surgery.plan.digest import hash_tensor
from surgery.plan.plan import Plan

PLAN = "plan.json"
TENSORS = "plan.safetensors"


def save_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json` into `folder`, and `plan.safetensors` where the plan holds tensors.

    The tensors are written before the JSON that names them.
    """
    if plan.tensors:
        plain = {name: t.detach().cpu().contiguous() for name, t in plan.tensors.items()}
        with write_whole(folder / TENSORS) as draft:
            save_file(plain, draft)
    write_json(folder / PLAN, plan.to_json())


def load_plan(folder: Path) -> Plan:
    """Read what `save_plan` wrote.

    Raises:
        PlanError: there is no plan, it is not complete, or it was made with other tensors.
    """
    try:
        data = read_json(folder / PLAN)
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder / PLAN} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{folder / PLAN} is not a plan")
    plan = Plan.from_json(data)
    if not plan.resolved:
        return plan
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{folder / TENSORS} cannot be read: {error}") from None
    for name, expected in plan.resolved.items():
        if name not in tensors or hash_tensor(tensors[name]) != expected:
            raise PlanError(f"{folder / TENSORS} does not hold the {name} of {PLAN}")
    return Plan.from_json(data, {name: tensors[name] for name in plan.resolved})


def forget_plan(folder: Path) -> None:
    """Remove the plan of an earlier run, so that no process takes it for this run's."""
    for name in (PLAN, TENSORS):
        (folder / name).unlink(missing_ok=True)
