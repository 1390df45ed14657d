"""Plans whose open decisions are made by calibration, operation after operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from surgery.anatomy import Site, find_sites
from surgery.calibration.budget import chosen_counts
from surgery.calibration.clone import sharing_copy
from surgery.calibration.gqa import PASSES, calibrate_sites
from surgery.calibration.options import Calibration
from surgery.calibration.refusals import refuse_repeated, refuse_shared
from surgery.calibration.view import Batch
from surgery.console import progress
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.operations.gqa import GQA
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.resolution import Resolution

# Steps that change how the model runs, and nothing that it computes.
RUNNING = ("fuse_qkv", "backend")


def calibrated_plan(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    batches: Iterable[Batch],
    options: Calibration | None = None,
    **making: Any,
) -> Plan:
    """`make_plan`, with every decision made that needs data. The model is not changed.

    Each operation that calibrates sees the model as the operations before it leave it. The batches
    are gone through several times; of what they do to the model, bounded sums are kept.

    Args:
        model: the source, with its weights.
        batches: arguments of forward passes, ``labels`` left out; the same ones in the same order
            give the same plan.
        options: how.
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
        assert isinstance(operation, GQA)
        operations[number], resolutions[number] = _calibrate_gqa(
            before, sites, operation, rows, options, native=bool(making.get("native"))
        )
        seen.append({
            "operation": operation.name,
            "sites": {path: dict(found.figures) for path, found in resolutions[number].items()},
        })  # fmt: skip
    calibration = None
    if seen:
        tokens = sum(_tokens(batch) for batch in rows)
        calibration = {"batches": len(rows), "tokens": tokens, "operations": seen}
    return make_plan(model, operations, resolutions=resolutions, calibration=calibration, **making)


def _calibrate_gqa(
    model: PreTrainedModel,
    sites: Sequence[Site],
    operation: GQA,
    batches: Sequence[Batch],
    options: Calibration,
    *,
    native: bool,
) -> tuple[GQA, Resolution]:
    # Sites keep their numbers where an earlier operation took some away.
    sites = [s for s in sites if operation.layers is None or s.layer in operation.layers]
    if operation.average is not None and native:
        operation = replace(operation, kv_heads=operation.counts(sites))
    if operation.average is not None:
        refuse_shared(model, sites)
        refuse_repeated(model, sites, batches[0])
        with progress("choosing KV heads per layer") as steps:

            def told(what: str) -> None:
                steps.describe(what)
                steps.advance()

            operation = chosen_counts(model, sites, operation, batches, options, told)
    counts = operation.counts(sites)
    changed = sum(site.kv_heads != count for site, count in zip(sites, counts, strict=True))
    if not operation.calibrated:
        return operation, {}
    refuse_shared(model, [s for s, n in zip(sites, counts, strict=True) if s.kv_heads != n])
    refuse_repeated(model, sites, batches[0])
    with progress("calibration", PASSES * changed * len(batches)) as steps:

        def advance(what: str) -> None:
            steps.describe(f"calibration, {what}")
            steps.advance()

        found = calibrate_sites(
            model, list(zip(sites, counts, strict=True)), operation, batches, options, advance
        )
    return operation, found


def _refuse_no_data(operation: Operation, batches: Sequence[Batch]) -> None:
    if not batches:
        raise ConfigError(
            f"attention.{operation.name}", "is calibrated, and there is no data to calibrate on",
            valid="at least one batch",
        )  # fmt: skip


def _tokens(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return int(ids.numel()) if ids is not None else 0
