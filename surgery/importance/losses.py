"""What is lost: per example, the label loss, or the distance from the model as it is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from surgery.config.schema import Task
from surgery.data.collate import IGNORED


class Targets(NamedTuple):
    """Where a batch is judged.

    Attributes:
        rows, positions: [P], the logits that are judged: row by row, in order. For a class per
            row, positions are empty.
        labels: [P], what each should have predicted.
        counts: [B], judged positions of each row.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor

    @property
    def total(self) -> int:
        return len(self.labels)


def targets(labels: torch.Tensor, task: Task) -> Targets:
    """The labelled positions of a batch; a causal model is judged one position earlier.

    Args:
        labels: [B, N] with -100 where nothing is predicted; [B] for a class per row.
    """
    if task is Task.sequence_classification:
        labels = labels.reshape(-1)
        (rows,) = (labels != IGNORED).nonzero(as_tuple=True)
        counts = (labels != IGNORED).long()
        return Targets(rows, rows.new_empty(0), labels[rows], counts)
    if task is Task.causal_lm:
        labels = labels[:, 1:]
    wanted = labels != IGNORED
    rows, positions = wanted.nonzero(as_tuple=True)
    return Targets(rows, positions, labels[rows, positions], wanted.sum(1))


def judged(logits: torch.Tensor, where: Targets) -> torch.Tensor:
    """[P, V], the judged rows of [B, N, V] (or [B, C]); halves become fp32."""
    logits = logits[where.rows] if logits.ndim == 2 else logits[where.rows, where.positions]
    return logits if logits.dtype == torch.float64 else logits.float()


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label: [P, V] and [P] to [P], in nats."""
    return logits.logsumexp(-1) - logits.gather(-1, labels[:, None]).squeeze(-1)


def divergences(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(p || softmax(logits)) of each row: twice [P, V] to [P], in nats.

    Args:
        log_p: log-probabilities of the model as it is.
    """
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def row_means(losses: torch.Tensor, where: Targets) -> torch.Tensor:
    """[B], each row's mean over its judged positions: [P] to [B]; 0 for a row without any."""
    sums = losses.new_zeros(len(where.counts)).index_add(0, where.rows, losses)
    return sums / where.counts.clamp(min=1)
