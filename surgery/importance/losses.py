"""Losses per position: the label loss, or the divergence from the unchanged model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from surgery.config.schema import Task
from surgery.data.collate import IGNORED
from surgery.errors import ConfigError


class LabelledPositions(NamedTuple):
    """The positions of a batch whose logits have a label.

    Attributes:
        rows, positions: [P], where these logits are, row by row. With one class per row,
            positions are empty.
        labels: [P], what each of them should predict.
        counts: [B], number of labelled positions of each row.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor

    @property
    def total(self) -> int:
        return len(self.labels)


def find_labelled_positions(labels: torch.Tensor, task: Task) -> LabelledPositions:
    """Find the labelled positions of a batch; in a causal model they are one position earlier.

    Args:
        labels: [B, N] with -100 where nothing is predicted; [B] with one class per row.
    """
    if task is Task.sequence_classification:
        labels = labels.reshape(-1)
        (rows,) = (labels != IGNORED).nonzero(as_tuple=True)
        counts = (labels != IGNORED).long()
        return LabelledPositions(rows, rows.new_empty(0), labels[rows], counts)
    if task is Task.causal_lm:
        labels = labels[:, 1:]
    wanted = labels != IGNORED
    rows, positions = wanted.nonzero(as_tuple=True)
    return LabelledPositions(rows, positions, labels[rows, positions], wanted.sum(1))


def select_labelled(logits: torch.Tensor, where: LabelledPositions) -> torch.Tensor:
    """Select the labelled rows of logits [B, N, V] (or [B, C]): [P, V], at least in fp32.

    Raises:
        ConfigError: the logits have no place for a label.
    """
    _check_logits(logits, where)
    logits = logits[where.rows] if logits.ndim == 2 else logits[where.rows, where.positions]
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_logits(logits: torch.Tensor, where: LabelledPositions) -> None:
    """Check that logits have a place for every label."""
    per_row = not len(where.positions)
    fits = logits.ndim == (2 if per_row else 3) and len(logits) == len(where.counts)
    fits = fits and bool(where.labels.max() < logits.shape[-1]) and bool(where.labels.min() >= 0)
    fits = fits and (per_row or bool(where.positions.max() < logits.shape[1]))
    if not fits:
        classes = "[rows, classes]" if per_row else "[rows, tokens, classes]"
        raise ConfigError(
            "data",
            f"the labels do not fit the model's logits of shape {list(logits.shape)}",
            given=f"{'one label per row' if per_row else 'one label per token'}, up to "
            f"{int(where.labels.max())}",
            valid=f"logits of shape {classes}, and labels below the number of classes",
        )


def compute_label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of each label: [P, V] and [P] → [P], in nats."""
    return logits.logsumexp(-1) - logits.gather(-1, labels[:, None]).squeeze(-1)


def compute_divergences(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Compute KL(p || softmax(logits)) of each row: twice [P, V] → [P], in nats.

    Args:
        log_p: log-probabilities of the unchanged model.
    """
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def average_rows(losses: torch.Tensor, where: LabelledPositions) -> torch.Tensor:
    """Average the losses of each row's labelled positions: [P] → [B]; 0 for a row without any."""
    sums = losses.new_zeros(len(where.counts)).index_add(0, where.rows, losses)
    return sums / where.counts.clamp(min=1)
