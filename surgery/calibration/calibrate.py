"""Plans whose open decisions are made by calibration, operation after operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from surgery.anatomy import find_sites
from surgery.calibration.case import Case
from surgery.calibration.clone import sharing_copy
from surgery.calibration.options import Calibration
from surgery.calibration.resolve_gqa import resolve_gqa
from surgery.calibration.resolve_pruning import resolve_pruning
from surgery.calibration.view import Batch
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.importance.estimate import Scorer
from surgery.operations.gqa import GQA
from surgery.operations.prune_heads import PruneHeads
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.resolution import Resolution

# Per operation that calibrates: who makes its decisions. It may come back with fewer of them open.
_RESOLVERS: dict[type[Operation], Callable[[Any, Case], tuple[Operation, Resolution]]] = {
    GQA: resolve_gqa,
    PruneHeads: resolve_pruning,
}
# Steps that change how the model runs, and nothing that it computes.
RUNNING = ("fuse_qkv", "backend")


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
        scorer: who scores heads for `prune_heads`; by default, `surgery.importance.score_heads` on
            `batches`, which need their ``labels`` then.
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
        before, sites = sharing_copy(model), find_sites(model).sites
        if number:
            earlier = make_plan(before, operations[:number], resolutions=resolutions, **same)
            # Fused or not, projections compute the same; here they are looked at one by one.
            apart = tuple(step for step in earlier.steps if step.kind not in RUNNING)
            before = apply_(before, replace(earlier, steps=apart), check=False)
            sites = earlier.after
        case = Case(before, sites, rows, options, scorer, native=bool(making.get("native")))
        operations[number], resolutions[number] = _RESOLVERS[type(operation)](operation, case)
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
