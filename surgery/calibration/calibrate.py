"""Make a plan and calibrate its pending operations, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration, Case
from surgery.calibration.divergence import predicts
from surgery.calibration.folds import Folds
from surgery.calibration.joint import Student, Text, fit_jointly
from surgery.console import say
from surgery.data.collate import Batch
from surgery.errors import ConfigError, SiteError
from surgery.execute.live import apply_
from surgery.importance.batches import prepare_batches
from surgery.importance.estimate import Scorer
from surgery.models.copies import make_sharing_copy
from surgery.models.editable import check_values
from surgery.models.sites import find_sites
from surgery.plan.amount import count_unknowns
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import get_operation
from surgery.plan.resolution import Resolution, name_tensors, put_tensors


def make_calibrated_plan(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    batches: Iterable[Batch],
    options: Calibration | None = None,
    scorer: Scorer | None = None,
    **making: Any,
) -> Plan:
    """Make a plan as `make_plan` does, and make every decision that needs data.

    The model is not changed.

    Each operation that calibrates sees the model after the operations before it. The batches are
    used several times; only sums of bounded size are kept.

    Args:
        model: the source, with its weights.
        batches: arguments of forward passes; the same batches in the same order give the same
            plan. ``labels`` are needed only for scores of heads.
        options: how to calibrate.
        scorer: scores heads if an operation needs it; by default
            `surgery.importance.score_heads` on `batches`, which then need ``labels``.
        making: the options of `make_plan`.

    Raises:
        ConfigError: an operation cannot be performed, or a site cannot be calibrated.
    """
    options = options or Calibration()
    rows = prepare_batches(model, batches)
    operations = list(operations)
    resolutions: dict[int, Resolution] = {}
    seen: list[dict[str, Any]] = []
    plan = make_plan(model, operations, **making)  # raises what calibration could not change
    if not any(operation.calibrated for operation in operations):
        return plan
    check_values(model)
    unknowns = count_unknowns(find_sites(model).sites)
    tokens = sum(_count_tokens(batch) for batch in rows)
    distinct = min(tokens, Folds(rows).tokens or tokens)
    few = 0 < distinct < unknowns  # 0: of images, for one, tokens are not counted
    same = {name: making[name] for name in ("seed", "device") if name in making}
    number, chosen = 0, None
    while number < len(operations):
        operation = operations[number]
        if not operation.calibrated:
            number += 1
            continue
        _refuse_no_data(operation, rows)
        before, sites = make_sharing_copy(model), find_sites(model).sites
        if number:
            earlier = make_plan(before, operations[:number], resolutions=resolutions, **same)
            # Steps that change only how the model runs are left out: calibration reads projections.
            steps = tuple(s for s in earlier.steps if not get_operation(s.operation).runs_only)
            before = apply_(before, replace(earlier, steps=steps), check=False)
            sites = earlier.after
        case = Case(
            before,
            sites,
            rows,
            options,
            scorer,
            native=bool(making.get("native")),
            **_get_scale(making),
        )
        try:
            if operation.chooses:
                found = operation.choose_operations(case)
                operations[number : number + 1] = found.operations
                chosen = {"operation": operation.to_json(), **found.figures}
                continue
            operations[number], resolutions[number] = operation.calibrate(case)
        except SiteError as error:
            raise operation.explain_calibration_error(error.path, error.why) from None
        figures: dict[str, Any] = {}
        if options.joint_steps and operations[number].fitted_jointly:
            if few:
                figures["joint"] = {"skipped": "too few distinct tokens"}
            else:
                plan = make_plan(model, operations[: number + 1], resolutions=resolutions, **same)
                resolutions[number], figures["joint"] = _fit_jointly(case, model, plan, number)
        seen.append(
            {
                "operation": operation.name,
                "sites": {path: dict(found.figures) for path, found in resolutions[number].items()},
                **figures,
            }
        )
        number += 1
    if few and options.ridge is None:
        say(
            f"  calibration: {distinct} distinct tokens for {unknowns} unknowns of an output: too "
            "few to fit more than the closed form"
        )
    calibration = {
        "batches": len(rows),
        "windows": sum(map(_count_windows, rows)),
        "tokens": tokens,
        "tokens_per_unknown": round(distinct / unknowns, 2),
        "operations": seen,
    }
    if chosen is not None:
        calibration["chosen"] = chosen
    return make_plan(model, operations, resolutions=resolutions, calibration=calibration, **making)


def _fit_jointly(
    case: Case, source: PreTrainedModel, plan: Plan, number: int
) -> tuple[Resolution, dict[str, Any]]:
    """Fit the tensors of the plan's last operation together, towards the model before it.

    Returns:
        its decisions with what was found, and the figures; or as they were, and why this was
        `skipped`.
    """
    resolution = plan.resolutions[number]
    tensors = name_tensors(number, resolution)
    if not tensors:
        return resolution, {"skipped": "nothing was fitted that could be"}
    if not predicts(case.model, case.batches[0]):
        return resolution, {"skipped": "the model returns no logits"}
    text = Text(case.model, case.batches)
    if not text.seen or not text.held_out:
        return resolution, {"skipped": "no text is left to hold out"}
    student = Student(source, plan, list(tensors))
    fault = student.find_fault(case.batches[0])
    if fault is not None:
        return resolution, {"skipped": f"the model does not run with its new heads: {fault}"}
    try:
        fit = fit_jointly(student, text, tensors, case.options.joint_steps)
    except torch.OutOfMemoryError:
        # Without it, calibration needs no backward pass of the whole model.
        why = "not enough memory for a backward pass; calibration.batch_size=1 needs less"
        say(f"  all layers together: left out: {why}")
        return resolution, {"skipped": why}
    return put_tensors(number, resolution, fit.tensors), dict(fit.figures)


def _get_scale(making: Mapping[str, Any]) -> dict[str, Any]:
    """Get at what sizes are counted, from options of `make_plan`."""
    names = {"tokens": "tokens", "value_bytes": "kv_bytes"}
    return {name: making[option] for name, option in names.items() if option in making}


def _refuse_no_data(operation: Operation, batches: Sequence[Batch]) -> None:
    if not batches:
        raise ConfigError(
            f"attention.{operation.name}",
            "must be calibrated, but there is no data to calibrate on",
            valid="at least one batch",
        )


def _count_windows(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


def _count_tokens(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return int(ids.numel()) if ids is not None else 0
