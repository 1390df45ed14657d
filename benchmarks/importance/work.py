"""One cell: score, or prune, heal and measure."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.importance.grid import ORIGINAL, SCORE, Cell
from benchmarks.importance.presets import PRESETS
from benchmarks.importance.subject import Subject, forward_seconds, subject
from benchmarks.shared import models
from benchmarks.shared.schedule import RefusedError
from surgery.errors import SurgeryError
from surgery.execute.live import apply_
from surgery.importance.table import GROUPS
from surgery.models.sites import Site, find_sites
from surgery.operations.prune_heads.operation import PruneHeads
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations

WEIGHTS_SEED = 0  # of the models that are trained here: one of each
# Model, weights and heads that went → figures of the cut.
_MEASURED: dict[tuple[str, str, str], dict[str, float]] = {}


@dataclass(frozen=True)
class Work:
    """Measures cells, in this process or another.

    Attributes:
        scores: folder of the score tables; those in it are used again.
    """

    preset: str
    models: Path
    scores: Path
    threads: int

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The record of `cell`. Raises: RefusedError."""
        warnings.filterwarnings("ignore")
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        torch.set_num_threads(self.threads)
        preset = PRESETS[self.preset]
        kind = preset.kinds[cell.kind]
        weights = models.identity(kind, WEIGHTS_SEED, self.models)
        with contextlib.redirect_stdout(io.StringIO()):
            it = subject(cell.kind, models.path_of(kind, WEIGHTS_SEED, self.models), self.preset)
            try:
                found = (self._score if cell.what == SCORE else self._prune)(cell, it, weights)
            except SurgeryError as error:
                raise RefusedError(str(error)) from None
        return cell.to_json() | {"weights": weights} | found

    def _score(self, cell: Cell, it: Subject, weights: str) -> dict[str, Any]:
        windows = it.windows(cell.seed)
        forward_seconds(it.original, windows[:1])  # whatever happens only once
        before = forward_seconds(it.original, windows)
        started = time.perf_counter()
        table = it.score(cell.estimator, cell.unit, cell.seed)
        score = time.perf_counter() - started
        after = forward_seconds(it.original, windows)
        table.save(self._file(cell, weights))
        kept = table.to_json()
        rows, errors = (
            ("group_scores", "group_standard_errors")
            if cell.unit == GROUPS
            else ("scores", "standard_errors")
        )
        return {
            "scores": kept[rows],
            "standard_errors": kept[errors],
            "batches": table.batches,
            "unit_of_scores": table.unit_of_scores,
            "forward_seconds": (before + after) / 2,
            "seconds": {"score": score, "forward": before + after},
        }

    def _prune(self, cell: Cell, it: Subject, weights: str) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        sites = find_sites(it.original).sites
        removed: dict[int, list[int]] = {}
        if cell.estimator != ORIGINAL:
            file = self._file(cell.scores, weights)
            if not file.exists():
                it.score(cell.estimator, cell.unit, cell.seed).save(file)
            removed = chosen(sites, cell, file)
        # Estimators that agree cut the same heads: what needs no training is measured once.
        same = (cell.kind, weights, json.dumps(removed, sort_keys=True))
        started = time.perf_counter()
        if cell.healed or same not in _MEASURED:
            model = cut(it.original, removed) if removed else it.original
            if cell.healed:
                model = it.heal(model, cell.seed)
                seconds["heal"] = time.perf_counter() - started
                started = time.perf_counter()
            figures = it.measure(model)
            if not cell.healed:
                _MEASURED[same] = figures
        else:
            figures = _MEASURED[same]
        seconds["measure"] = time.perf_counter() - started
        return {
            **figures,
            "removed": sum(map(len, removed.values())),
            "heads": sum(site.q_heads for site in sites),
            "removed_heads": {str(layer): heads for layer, heads in removed.items()},
            "steps": PRESETS[self.preset].healing_steps if cell.healed else 0,
            "seconds": seconds,
        }

    def _file(self, cell: Cell, weights: str) -> Path:
        self.scores.mkdir(parents=True, exist_ok=True)
        name = f"{cell.kind}-{weights}-{cell.unit}-{cell.estimator}-{cell.seed}.json"
        return self.scores / name


def chosen(sites: Sequence[Site], cell: Cell, scores: Path) -> dict[int, list[int]]:
    """Layer → query heads of which the table at `scores` holds least.

    Where query heads share KV heads, `heads` goes by one query head of every KV head at a time.
    """
    shared = any(site.group_size > 1 for site in sites)
    (operation,) = parse_operations(
        {
            "prune_heads": {
                "amount": cell.amount,
                "scores": str(scores),
                "scope": cell.scope,
                "cut": "queries" if shared and cell.unit != GROUPS else "groups",
            }
        }
    )
    assert isinstance(operation, PruneHeads)
    return {layer: heads for layer, heads in operation.choose(sites).items() if heads}


def cut(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """A copy of `model` without these query heads."""
    mine = copy.deepcopy(model)
    plan = make_plan(mine, parse_operations({"prune_heads": {"heads": dict(heads)}}))
    return apply_(mine, plan)
