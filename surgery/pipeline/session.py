"""The state of one run: its config, what was prepared for it, and its results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.config.schema import RunConfig, Stage
from surgery.console import print_heading
from surgery.importance.table import ScoreTable
from surgery.models.source import ModelSource
from surgery.pipeline.memory import MemoryWatch, Peaks, merge_peaks
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_specs
from surgery.signals import naming_stage

if TYPE_CHECKING:  # Lightning and datasets take seconds to import, and a plan needs neither
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger

    from surgery.data.module import TextData
    from surgery.measure import Measurement


def resolve_device(wanted: str) -> str:
    """Resolve `model.device`: ``auto`` is the first GPU, if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Prepared:
    """What `prepare` made before anything was written; stages read it.

    Attributes:
        source: where the model comes from.
        operations: all that are declared, in order.
        planning: the options of `make_plan`, the same for every plan of the run.
        plan: from the original to the result, as far as it can be known before data is seen.
        tokenizer, data: if a stage needs them.
        loaded_tokenizer: a copy of the tokenizer as it was loaded, to be exported: calls change a
            tokenizer's truncation, and `save_pretrained` would write it.
        callbacks: of the training.
        task_data: the data of each task, where several are declared (`tasks.data`).
    """

    source: ModelSource
    operations: Sequence[Operation]
    planning: dict[str, Any]
    plan: Plan
    tokenizer: PreTrainedTokenizerBase | None = None
    loaded_tokenizer: PreTrainedTokenizerBase | None = None
    data: TextData | None = None
    callbacks: list[Callback] = field(default_factory=list)
    task_data: dict[str, TextData] = field(default_factory=dict)


@dataclass
class Results:
    """The results of the stages. Empty, or ``None``, if a stage did not run.

    Attributes:
        measurements: by moment: before, after_surgery, after_training.
        scores: importance of every head, by the name of the file it is in (see `files.py`).
        samples: what the model wrote at these moments.
        analysis: what each head does.
        text: the original's loss on the held-out text, beside that of counting tokens.
        comparison: the result of a better way of an operation.
        tasks: results for several tasks, for `tasks.json`.
        training, export: for the summary.
        timings: stage → seconds.
        memory: stage → the most memory that it took.
    """

    measurements: dict[str, Measurement] = field(default_factory=dict)
    scores: dict[str, ScoreTable] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Peaks] = field(default_factory=dict)


@dataclass
class Session:
    """One run: earlier stages write to it, later stages read it.

    Attributes:
        run: the checked config.
        settings: the same as plain data, for loggers.
        plan: from the original to the model, as far as it is decided: the operation that training
            decides on is added after training. The stage `calibrate` closes the plan.
        model: loaded by the first stage that needs weights, changed by the stage `operate`.
        random_state: of torch on the CPU, before it was loaded: weights may be drawn.
        loggers: empty until the first figure is sent; open until the run ends.
    """

    run: RunConfig
    settings: dict[str, Any]
    run_dir: Path
    prepared: Prepared
    plan: Plan
    model: PreTrainedModel | None = None
    random_state: torch.Tensor | None = None
    results: Results = field(default_factory=Results)
    loggers: list[Logger] = field(default_factory=list)
    memory_watch: MemoryWatch = field(default_factory=MemoryWatch)

    @property
    def immediate(self) -> list[Operation]:
        """The operations that `plan` holds."""
        return list(self.prepared.operations[: len(self.plan.operations)])

    @property
    def deferred(self) -> Operation | None:
        """The operation that training has yet to decide on; ``None`` if there is none."""
        left = self.prepared.operations[len(self.plan.operations) :]
        return left[0] if left else None

    def adopt_plan(self, plan: Plan) -> None:
        """Go on with a plan that calibration closed; it may have chosen other operations."""
        left = [] if self.deferred is None else [self.deferred]
        self.plan = plan
        self.prepared.operations = [*parse_specs(plan.operations), *left]

    @property
    def whole_plan(self) -> Plan:
        """The plan from the original to the result, as far as it is known."""
        return self.plan if self.deferred is None else self.prepared.plan

    @property
    def device(self) -> torch.device:
        return torch.device(resolve_device(self.run.model.device))

    @property
    def source(self) -> ModelSource:
        return self.prepared.source

    @property
    def data(self) -> TextData:
        """The data, which `prepare` reads if a stage needs it."""
        assert self.prepared.data is not None
        return self.prepared.data

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which `prepare` loads if a stage needs it."""
        assert self.prepared.tokenizer is not None
        return self.prepared.tokenizer

    def has(self, stage: Stage) -> bool:
        return stage in self.run.stages

    def load_model(self) -> PreTrainedModel:
        """Return the model; the first call loads it."""
        if self.model is None:
            with self.time_stage("load"):
                self.random_state = torch.get_rng_state()
                self.model = self.source.load().to(self.device)  # type: ignore[arg-type]
        return self.model

    def load_again(self) -> PreTrainedModel:
        """Load the model that `load_model` has loaded, weights that are random included."""
        with torch.random.fork_rng():
            if self.random_state is not None:
                torch.set_rng_state(self.random_state)
            return self.source.load()

    @contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Print a heading, time a stage, and watch its memory.

        `timings` sums the seconds of each name, `memory` keeps the highest peaks. A signal that
        ends the run in it learns its name.
        """
        with naming_stage(name):
            print_heading(name)
            self.memory_watch.begin()
            start = time.perf_counter()
            try:
                yield
            finally:
                seconds, peaks = time.perf_counter() - start, self.memory_watch.end()
        timings, memory = self.results.timings, self.results.memory
        timings[name] = timings.get(name, 0.0) + seconds
        memory[name] = merge_peaks(memory[name], peaks) if name in memory else peaks
