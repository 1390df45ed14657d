"""The teacher of a distilled model: the original of its run, or another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.config.schema import ModelConfig
from surgery.console import say
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


def check_teacher_tokens(
    original: ModelConfig, teacher: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that every token of the student means the same to another teacher.

    Args:
        tokenizer: the student's, which makes the tokens that both read.

    Raises:
        ConfigError: the teacher's tokenizer has another text for a token, or cannot be loaded.
    """
    source = locate_teacher(replace(original, tokenizer=None), teacher)
    with naming_teacher(teacher):
        if not source.has_tokenizer():
            say("  objective.teacher brings no tokenizer: that its tokens are the same is trusted")
            return
        theirs = source.load_tokenizer().get_vocab()
    own = tokenizer.get_vocab()
    for token, number in sorted(own.items(), key=lambda item: item[1]):
        if theirs.get(token) == number:
            continue
        known = next((text for text, place in theirs.items() if place == number), None)
        other = "nothing" if known is None else repr(known)
        raise ConfigError(
            "objective.teacher",
            f"was trained on other tokens: token {number} is {token!r} here, and {other} there",
            given=teacher,
            valid="a model with the same tokenizer",
        )


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
