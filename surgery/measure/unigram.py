"""Whether a model knows a text at all: its loss beside that of counting tokens.

A corpus in another language than the model's, or tokens of another tokenizer, give a high loss. How
high is too high depends on the tokens, and their frequencies are a yardstick that depends on no
model. A language model that saves less than `LEAST_GAIN` of the loss of these takes next to nothing
from what stands before a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from surgery.config.schema import Task
from surgery.data.collate import IGNORED, Batch
from surgery.data.module import TextData

# Share of the unigram loss that a model must save to be said to know the text. Measured: SmolLM2
# saves 0.62 on Python, 0.30 on short English messages, 0.19 on Finnish ones; the embedded model
# 0.65 on Python, and less than nothing on Finnish, German, Russian, Chinese.
LEAST_GAIN = 0.2
# Training tokens that frequencies are counted on, at most: reading text takes time, too.
MOST_TOKENS = 200_000


def compute_unigram_loss(data: TextData, task: Task, *, windows: int, vocabulary: int) -> float:
    """Compute the mean loss of a unigram model of the training text on the held-out text.

    It predicts the same held-out tokens as `measure_held_out_loss`, in nats per token.

    Args:
        windows: held-out windows, the first ones.
        vocabulary: number of tokens that the model knows.
    """
    rows = max(1, MOST_TOKENS // data.cfg.seq_len)
    fitted = _count(data.draw_importance_batches(rows, 16), task, vocabulary)
    seen = _count(data.load_held_out_batches(windows, 16), task, vocabulary)
    size = max(len(fitted), len(seen))
    fitted, seen = (torch.nn.functional.pad(one, (0, size - len(one))) for one in (fitted, seen))
    return compute_cross_entropy(fitted, seen)


def compute_cross_entropy(fitted: torch.Tensor, seen: torch.Tensor) -> float:
    """Compute the mean negative log-likelihood of `seen` under the frequencies of `fitted`.

    Tokens that were not seen get a share, too: interpolation with the uniform distribution by
    Witten and Bell (1991, method C): (c + T / V) / (N + T), with T different ones of N tokens.

    Args:
        fitted, seen: counts of each of V tokens, [V].
    """
    kinds, total, size = int((fitted > 0).sum()), int(fitted.sum()), len(fitted)
    if total == 0:
        return float(torch.tensor(size).log())
    probabilities = (fitted.double() + kinds / size) / (total + kinds)
    return float(-(seen.double() * probabilities.log()).sum() / seen.sum().clamp(min=1))


def describe_misfit(loss: float, unigram_loss: float, key: str) -> str | None:
    """Say that a model does not know a text; ``None`` if it does.

    Args:
        loss, unigram_loss: in nats per token, on the same tokens.
        key: of the config, which names the text.
    """
    if loss < (1 - LEAST_GAIN) * unigram_loss:
        return None
    return (
        f"{key}: the original hardly knows this text: its held-out loss is {loss:.2f} nats per "
        f"token, and the frequencies of the tokens alone give {unigram_loss:.2f}. Is it in another "
        "language, or of another tokenizer? What is fitted to it or measured on it says little "
        "about the model"
    )


def _count(batches: Iterable[Batch], task: Task, vocabulary: int) -> torch.Tensor:
    """Count the labelled tokens, [V]."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for batch in batches:
        labels = batch["labels"]
        labels = labels[:, 1:] if task is Task.causal_lm else labels
        found = torch.bincount(labels[labels != IGNORED].flatten(), minlength=vocabulary)
        counts = torch.nn.functional.pad(counts, (0, len(found) - len(counts))) + found
    return counts
