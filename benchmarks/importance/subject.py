"""A model of the grid as every cell needs it: scored, measured, healed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

import torch
from transformers import PreTrainedModel

from benchmarks.importance.language import LanguageModel
from benchmarks.importance.presets import BERT, PRESETS
from benchmarks.importance.sentence_model import SentenceModel
from surgery.data.collate import Batch
from surgery.importance import ScoreTable
from surgery.models.packed import make_inputs


class Subject(Protocol):
    """Language models are judged by their label loss, bert by how far its embeddings moved."""

    original: PreTrainedModel

    def windows(self, seed: int) -> list[Batch]:
        """Training text that every estimator looks at, drawn by the seed."""

    def score(self, estimator: str, unit: str, seed: int) -> ScoreTable:
        """One estimator's scores on `windows`."""

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """loss: what is lost, on held-out text; and what else is worth a look."""

    def heal(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """Train `model` in place towards the original, for the preset's steps.

        Raises:
            DivergedError: the loss is no number any more.
        """


@lru_cache(maxsize=8)
def subject(kind: str, path: str, preset: str) -> Subject:
    if kind == BERT:
        return SentenceModel(path, PRESETS[preset])
    return LanguageModel(path, PRESETS[preset])


@torch.inference_mode()
def forward_seconds(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Of one pass over `batches` and nothing else."""
    model.eval()
    started = time.perf_counter()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        model(**make_inputs(model, inputs))
    return time.perf_counter() - started
