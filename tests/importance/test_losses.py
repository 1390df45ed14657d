"""Losses per position against the ones that the project measures and trains with."""

from __future__ import annotations

import pytest
import torch

from surgery.config.schema import Task
from surgery.importance.losses import (
    average_rows,
    compute_divergences,
    compute_label_losses,
    find_labelled_positions,
    select_labelled,
)
from surgery.importance.work import compute_logits
from surgery.measure.loss import compute_mean_loss
from surgery.training.objectives import compute_distillation_kl, count_labelled
from tests.importance.cases import CASES, case


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_mean_over_positions_is_the_held_out_loss(name: str) -> None:
    model, batch, task = case(name)
    where = find_labelled_positions(batch["labels"], task)
    losses = compute_label_losses(
        select_labelled(compute_logits(model, batch), where), where.labels
    )
    expected = compute_mean_loss(model, [dict(batch)], task, total=1, label="test")
    assert losses.mean().item() == pytest.approx(expected, abs=1e-6)
    assert where.total == count_labelled(dict(batch), task)


@torch.no_grad()
def test_mean_of_a_row_is_the_loss_of_that_row_alone() -> None:
    model, batch, task = case("llama")
    where = find_labelled_positions(batch["labels"], task)
    means = average_rows(
        compute_label_losses(select_labelled(compute_logits(model, batch), where), where.labels),
        where,
    )
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        expected = compute_mean_loss(model, [alone], task, total=1, label="test")
        assert means[row].item() == pytest.approx(expected, abs=1e-6)


def test_a_row_without_labels_weighs_nothing() -> None:
    labels = torch.tensor([[5, -100, -100], [-100, 7, 8]])
    where = find_labelled_positions(labels, Task.causal_lm)
    assert where.rows.tolist() == [1, 1]
    assert where.positions.tolist() == [0, 1]
    assert where.labels.tolist() == [7, 8]
    assert average_rows(torch.tensor([1.0, 4.0]), where).tolist() == [0.0, 2.5]


@pytest.mark.parametrize("task", [Task.causal_lm, Task.masked_lm, Task.sequence_classification])
def test_divergence_is_that_of_distillation(task: Task) -> None:
    shape = (3, 11) if task is Task.sequence_classification else (3, 7, 11)
    logits, other = torch.randn(2, *shape).double()
    labels = torch.randint(0, 11, shape[:-1])
    if task is not Task.sequence_classification:
        labels[1, 3:] = -100
    where = find_labelled_positions(labels, task)
    mine = compute_divergences(
        select_labelled(logits, where), select_labelled(other, where).log_softmax(-1)
    )
    expected = compute_distillation_kl(logits, other, labels, 1.0, task)
    assert mine.mean().item() == pytest.approx(expected.item(), rel=1e-5)
