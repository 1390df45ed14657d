"""The teacher of a distilled model: the original of its run, or another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from surgery.config.schema import ModelConfig
from surgery.errors import ConfigError
from surgery.models.source import ModelSource


def locate_teacher(original: ModelConfig, teacher: str | None) -> ModelSource:
    """Locate `objective.teacher`; ``None`` stands for the original.

    Task, dtype, attention implementation and trust in remote code are those of `model.*`.
    """
    if teacher is None:
        return ModelSource(original)
    return ModelSource(
        replace(original, path=teacher, revision=None, scratch=None, num_labels=None)
    )


def load_teacher(original: ModelConfig, teacher: str | None) -> PreTrainedModel:
    """Load the teacher with its weights, on the CPU, frozen and in eval mode.

    Raises:
        ConfigError: the weights cannot be had or do not fit the config.
    """
    with naming_teacher(teacher):
        model = locate_teacher(original, teacher).load()
    return model.requires_grad_(False).eval()


@contextmanager
def naming_teacher(teacher: str | None) -> Iterator[None]:
    """Name `objective.teacher` in errors about another teacher's model."""
    try:
        yield
    except ConfigError as error:
        if teacher is None:
            raise
        raise ConfigError(
            "objective.teacher", error.problem, given=teacher, valid=error.valid
        ) from None
