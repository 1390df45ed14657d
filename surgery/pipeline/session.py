"""What the stages of a run share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.config.schema import RunConfig, Stage
from surgery.console import print_heading
from surgery.models.source import ModelSource
from surgery.plan.plan import Plan

if TYPE_CHECKING:  # Lightning and datasets take seconds to import; a plan needs neither
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger

    from surgery.data.module import TextData
    from surgery.importance import ScoreTable
    from surgery.measure import Measurement
    from surgery.pipeline.deferred import Deferred


def device_name(wanted: str) -> str:
    """What `model.device` means here: ``auto`` is the first GPU, if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Session:
    """The state of a run. Earlier stages fill it, later ones read it.

    Attributes:
        run: the checked config.
        settings: the same as plain data, for loggers and cards.
        plan: always made, whichever stages run: making it is the check. Closed by `calibrate`.
        model: loaded by the first stage that needs weights, operated by `operate`.
        deferred: what training decides on; ``None`` where nothing is left to it. Until it has, the
            plan holds the operations before that one.
        loggers: empty until the first figure is sent; open until the run ends.
        measurements: by moment: before, after_surgery, after_training.
        scores: importance of every head, where it was measured.
        analysis: what each head does, where it was asked.
        comparison: what another merge would have given, where that was asked for.
        task_data: the data of each task, where several are declared (`tasks.data`).
        task_runs: a run per task, where each has a model of its own; done in place of this one.
        task_tables: the scores of each, where they were measured.
        tasks: what was found of them, for `tasks.json`.
    """

    run: RunConfig
    settings: dict[str, Any]
    run_dir: Path
    source: ModelSource
    plan: Plan
    deferred: Deferred | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: TextData | None = None
    callbacks: list[Callback] = field(default_factory=list)
    loggers: list[Logger] = field(default_factory=list)
    model: PreTrainedModel | None = None
    measurements: dict[str, Measurement] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    scores: ScoreTable | None = None
    analysis: dict[str, Any] = field(default_factory=dict)
    task_data: dict[str, TextData] = field(default_factory=dict)
    task_runs: dict[str, Session] = field(default_factory=dict)
    task_tables: dict[str, ScoreTable] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def whole_plan(self) -> Plan:
        """From the original to the result, as far as it is known by now."""
        return self.plan if self.deferred is None else self.deferred.expected

    def has(self, stage: Stage) -> bool:
        return stage in self.run.stages

    @property
    def device(self) -> torch.device:
        return torch.device(device_name(self.run.model.device))

    def loaded(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        if self.model is None:
            with self.stage("load"):
                self.model = self.source.load().to(self.device)  # type: ignore[arg-type]
        return self.model

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce and time a stage; `timings` adds up what one name took, in seconds."""
        print_heading(name)
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
