"""A copy of a model with fewer KV heads, merged in one of several ways."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.merge_quality.schedule import RefusedError
from surgery.calibration import make_calibrated_plan
from surgery.errors import SurgeryError
from surgery.execute.live import apply_
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import PLAN, load_plan, save_plan

# What `attention.gqa` says for each merge.
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"merge": "mean"},
    "first": {"merge": "first"},
    "aligned": {"merge": "aligned"},
    "aligned_renorm": {"merge": "aligned_renorm"},
    "optimal": {"merge": "optimal", "grouping": "similarity"},
}


def convert(
    model: PreTrainedModel,
    merge: str,
    kv_heads: int,
    windows: Iterable[dict[str, torch.Tensor]],
    kept: Path,
) -> PreTrainedModel:
    """`model` is left as it is.

    Args:
        windows: batches {"input_ids": [B, S]} of training text, for merges that look at text.
        kept: folder of the resolved plan; made where it is absent, so that cells that heal the
            same conversion calibrate once.

    Raises:
        RefusedError: not this merge on this model.
    """
    mine = copy.deepcopy(model)
    operations = parse_operations({"gqa": {"kv_heads": kv_heads, **OPTIONS[merge]}})
    try:
        if not any(operation.calibrated for operation in operations):
            return apply_(mine, make_plan(mine, operations))
        if not (kept / PLAN).exists():
            kept.mkdir(parents=True, exist_ok=True)
            save_plan(make_calibrated_plan(mine, operations, windows), kept)
        return apply_(mine, load_plan(kept))
    except SurgeryError as error:
        raise RefusedError(str(error)) from None
