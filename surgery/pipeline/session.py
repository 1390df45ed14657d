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
from surgery.console import heading
from surgery.models.source import ModelSource
from surgery.plan.plan import Plan

if TYPE_CHECKING:  # Lightning and datasets take seconds to import; a plan needs neither
    from pytorch_lightning.callbacks import Callback

    from surgery.data.module import TextData
    from surgery.measure import Measurement


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
        measurements: by moment: before, after_surgery, after_training.
        comparison: what another merge would have given, where that was asked for.
    """

    run: RunConfig
    settings: dict[str, Any]
    run_dir: Path
    source: ModelSource
    plan: Plan
    tokenizer: PreTrainedTokenizerBase | None = None
    data: TextData | None = None
    callbacks: list[Callback] = field(default_factory=list)
    model: PreTrainedModel | None = None
    measurements: dict[str, Measurement] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

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
        heading(name)
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
