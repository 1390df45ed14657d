"""What a step minimises, against plain references."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from surgery.config.schema import ObjectiveConfig, ObjectiveName, Task
from surgery.data.collate import IGNORED
from surgery.training.objectives import (
    compute_distillation_kl,
    compute_training_loss,
    count_labelled,
)
from tests.tiny_models import VOCAB, tiny_model, tokens

IDS = tokens(3, 9)


def _labels() -> torch.Tensor:
    labels = IDS.clone()
    labels[0, 5:] = IGNORED
    labels[2, 3] = IGNORED
    return labels


def _reference(
    logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, temperature: float, ahead: int
) -> torch.Tensor:
    """T^2 times the mean KL(teacher || student), position by position."""
    terms = []
    for row in range(labels.shape[0]):
        for place in range(ahead, labels.shape[1]):
            if labels[row, place] == IGNORED:
                continue
            student = Categorical(logits=logits[row, place - ahead].double() / temperature)
            teacher = Categorical(logits=target[row, place - ahead].double() / temperature)
            terms.append(kl_divergence(teacher, student))
    return temperature**2 * torch.stack(terms).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("task", "ahead"), [(Task.causal_lm, 1), (Task.masked_lm, 0)])
def test_kl_is_the_textbook_one(temperature: float, task: Task, ahead: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 9, VOCAB) * 3
    labels = _labels()
    found = compute_distillation_kl(logits, target, labels, temperature, task)
    expected = _reference(logits, target, labels, temperature, ahead)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_kl_of_classes_is_a_mean_over_rows() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5, 4)
    labels = torch.zeros(5, dtype=torch.long)
    found = compute_distillation_kl(logits, target, labels, 2.0, Task.sequence_classification)
    student, teacher = (Categorical(logits=x / 2.0) for x in (logits, target))
    torch.testing.assert_close(found, 4.0 * kl_divergence(teacher, student).mean())


def test_kl_of_equals_is_nothing_and_has_no_slope() -> None:
    logits = torch.randn(3, 9, VOCAB, requires_grad=True)
    kl = compute_distillation_kl(logits, logits.detach().clone(), _labels(), 1.5, Task.causal_lm)
    kl.backward()
    assert kl.abs() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_high_temperatures_match_logits() -> None:
    """T^2 KL tends to half the variance of the logits' difference (Hinton et al. 2015, eq. 4)."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 2, VOCAB)
    labels = torch.ones(1, 2, dtype=torch.long)
    found = compute_distillation_kl(logits, target, labels, 300.0, Task.causal_lm)
    difference = logits[0, 0] - target[0, 0]
    torch.testing.assert_close(found, difference.var(correction=0) / 2, rtol=2e-2, atol=0)


def test_ignored_positions_do_not_matter() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 9, VOCAB)
    labels = _labels()
    before = compute_distillation_kl(logits, target, labels, 1.0, Task.causal_lm)
    logits[0, 4:] += 5 * torch.randn(5, VOCAB)
    logits[:, -1] -= 7 * torch.randn(3, VOCAB)
    torch.testing.assert_close(
        compute_distillation_kl(logits, target, labels, 1.0, Task.causal_lm), before
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_lm_is_the_models_own_loss(name: str) -> None:
    model = tiny_model(name)
    batch = {"input_ids": IDS, "labels": _labels()}
    task = Task.masked_lm if name == "bert" else Task.causal_lm
    cfg = ObjectiveConfig(ObjectiveName.lm, temperature=1.0, label_weight=1.0)
    loss = compute_training_loss(model, None, batch, cfg, task)
    assert torch.equal(loss.total, model(**batch).loss)
    assert not loss.parts


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distill_mixes_kl_and_labels(weight: float) -> None:
    student, teacher = tiny_model("llama", seed=0), tiny_model("llama", seed=1).eval()
    batch = {"input_ids": IDS, "labels": _labels()}
    cfg = ObjectiveConfig(ObjectiveName.distill, temperature=2.0, label_weight=weight)
    loss = compute_training_loss(student, teacher, batch, cfg, Task.causal_lm)
    with torch.no_grad():
        output = student(**batch)
        kl = _reference(output.logits, teacher(IDS).logits, batch["labels"], 2.0, 1)
    expected = (1 - weight) * kl + weight * output.loss.double()
    torch.testing.assert_close(loss.total.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.parts["kl"].double(), kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.parts["label_loss"], output.loss)
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_distilling_from_oneself_teaches_nothing() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama").eval()
    batch = {"input_ids": IDS, "labels": _labels()}
    cfg = ObjectiveConfig(ObjectiveName.distill, temperature=1.0, label_weight=0.0)
    compute_training_loss(student, teacher, batch, cfg, Task.causal_lm).total.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in student.parameters())


@pytest.mark.parametrize("objective", list(ObjectiveName))
def test_packed_documents_stay_apart(objective: ObjectiveName) -> None:
    """The loss of a packed window is that of its documents, teacher's half included."""
    student, teacher = tiny_model("llama", seed=0), tiny_model("llama", seed=1).eval()
    labels = IDS.clone()
    labels[:, [0, 4]] = IGNORED
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, 9)
    cfg = ObjectiveConfig(objective, temperature=1.0, label_weight=0.5)

    def loss(ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids, **more}
        return compute_training_loss(student, teacher, batch, cfg, Task.causal_lm).total.detach()

    packed = loss(IDS, position_ids=positions, labels=labels)
    apart = (3 * loss(IDS[:, :4]) + 4 * loss(IDS[:, 4:])) / 7
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)


def test_labelled_counts_what_the_loss_is_a_mean_over() -> None:
    batch = {"input_ids": IDS, "labels": _labels()}
    assert count_labelled(batch, Task.masked_lm) == 27 - 5
    assert count_labelled(batch, Task.causal_lm) == 27 - 5 - 3
    rows = {"labels": torch.zeros(6, dtype=torch.long)}
    assert count_labelled(rows, Task.sequence_classification) == 6
