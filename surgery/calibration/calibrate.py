"""Plans whose open decisions are made by calibration, operation after operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from surgery.calibration.case import Case
from surgery.calibration.options import Calibration
from surgery.calibration.view import Batch
from surgery.errors import ConfigError, SiteError
from surgery.execute.live import apply_
from surgery.importance.estimate import Scorer
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import operation_class
from surgery.plan.resolution import Resolution


def calibrated_plan(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    batches: Iterable[Batch],
    options: Calibration | None = None,
    scorer: Scorer | None = None,
    **making: Any,
) -> Plan:
    """`make_plan`, with every decision made that needs data. The model is not changed.

    Each operation that calibrates sees the model as the operations before it leave it. The batches
    are gone through several times; of what they do to the model, bounded sums are kept.

    Args:
        model: the source, with its weights.
        batches: arguments of forward passes; the same ones in the same order give the same plan.
            ``labels`` are needed for scores of heads alone.
        options: how.
        scorer: who scores heads, where an operation asks; by default,
            `surgery.importance.score_heads` on `batches`, which need their ``labels`` then.
        making: `make_plan`'s own options.

    Raises:
        ConfigError: an operation that cannot be performed, or a site that cannot be calibrated.
    """
    options = options or Calibration()
    rows = list(batches)
    operations = list(operations)
    resolutions: dict[int, Resolution] = {}
    seen: list[dict[str, Any]] = []
    make_plan(model, operations, **making)  # refuses what no calibration could save
    same = {name: making[name] for name in ("seed", "device") if name in making}
    for number, operation in enumerate(operations):
        if not operation.calibrated:
            continue
        _refuse_no_data(operation, rows)
        before, sites = make_sharing_copy(model), find_sites(model).sites
        if number:
            earlier = make_plan(before, operations[:number], resolutions=resolutions, **same)
            # What only runs otherwise computes the same; projections are looked at one by one.
            asked = tuple(s for s in earlier.steps if not operation_class(s.operation).runs_only)
            before = apply_(before, replace(earlier, steps=asked), check=False)
            sites = earlier.after
        case = Case(before, sites, rows, options, scorer, native=bool(making.get("native")))
        try:
            operations[number], resolutions[number] = operation.calibrate(case)
        except SiteError as error:
            raise operation.uncalibratable(error.path, error.why) from None
        seen.append(
            {
                "operation": operation.name,
                "sites": {path: dict(found.figures) for path, found in resolutions[number].items()},
            }
        )
    calibration = None
    if seen:
        tokens = sum(_tokens(batch) for batch in rows)
        calibration = {"batches": len(rows), "tokens": tokens, "operations": seen}
    return make_plan(model, operations, resolutions=resolutions, calibration=calibration, **making)


def _refuse_no_data(operation: Operation, batches: Sequence[Batch]) -> None:
    if not batches:
        raise ConfigError(
            f"attention.{operation.name}",
            "is calibrated, and there is no data to calibrate on",
            valid="at least one batch",
        )


def _tokens(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return int(ids.numel()) if ids is not None else 0
