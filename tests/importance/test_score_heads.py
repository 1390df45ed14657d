"""`score_heads` as a whole: the table, what is refused, and that the model stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import surgery
from surgery import ConfigError, find_sites, score_heads
from surgery.config.schema import ObjectiveName
from surgery.importance.table import ESTIMATORS, UNITS
from surgery.measure.loss import compute_mean_loss
from tests.importance.cases import case


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_table_says_what_was_measured(estimator: str) -> None:
    model, batch, task = case("qwen3")
    short = {name: value[:1] for name, value in batch.items()}
    table = score_heads(
        model, [batch, short], estimator, task=task, seed=5, model_name="m", data_name="d"
    )
    sites = find_sites(model).sites
    for unit, count in zip(UNITS, (8, 4), strict=True):
        found = table.get_scores(unit)
        assert [(one.layer, one.site) for one in found] == [(s.layer, s.path) for s in sites]
        assert all(len(one.scores) == len(one.errors) == count for one in found)
        assert all(math.isnan(e) == (estimator == "random") for one in found for e in one.errors)
    assert (table.model, table.data, table.seed, table.estimator) == ("m", "d", 5, estimator)
    assert table.batches == (0 if estimator == "random" else 2)
    if estimator in ("gate_gradient", "leave_one_out"):
        both = [dict(batch), dict(short)]
        whole = compute_mean_loss(model, both, task, total=2, label="whole")
        assert table.loss == pytest.approx(whole, abs=1e-6)
        assert table.tokens == 9 + 5 + 9 + 9
        assert table.unit_of_scores == "nats"
    else:
        assert table.loss is None


def test_scores_of_batches_are_those_of_all_rows_at_once() -> None:
    """Weighted by tokens, so that how rows are dealt to batches does not matter."""
    model, batch, task = case("llama")
    (whole,) = score_heads(model, [batch], "leave_one_out", task=task).heads[:1]
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    (parts,) = score_heads(model, rows, "leave_one_out", task=task).heads[:1]
    assert parts.scores == pytest.approx(whole.scores, abs=1e-9)


@pytest.mark.parametrize("estimator", ["gate_gradient", "leave_one_out", "output_norm"])
def test_the_model_stays_as_it_was(estimator: str) -> None:
    model, batch, task = case("llama")
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    learning = [one.requires_grad for one in model.parameters()]
    weights = [one.clone() for one in model.parameters()]
    score_heads(model, [batch], estimator, task=task)
    assert [module.training for module in model.modules()] == flags
    assert [one.requires_grad for one in model.parameters()] == learning
    assert all(one.grad is None for one in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_takes_no_part() -> None:
    model, batch, task = case("gpt2")
    expected = score_heads(model, [batch], "leave_one_out", task=task)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = score_heads(model.train(), [batch], "leave_one_out", task=task)
    assert found.heads == pytest.approx(expected.heads) or found.heads[0].scores == pytest.approx(
        expected.heads[0].scores
    )


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"estimator": "gate_gradients"}, "importance.estimator"),
        ({"objective": ObjectiveName.distill}, "importance.objective"),
        ({"units": ["queries"]}, "importance.units"),
        ({"units": []}, "importance.units"),
        ({"memory_rows": 0}, "importance.memory_windows"),
        ({"batches": []}, "importance.windows"),
        ({"sites": []}, "model"),
    ],
)
def test_refusals(given: dict[str, Any], key: str) -> None:
    model, batch, task = case("llama")
    arguments = {"batches": [batch], "estimator": "gate_gradient", "task": task, **given}
    with pytest.raises(ConfigError) as refused:
        score_heads(model, **arguments)
    assert refused.value.key == key


@pytest.mark.parametrize("estimator", ["gate_gradient", "leave_one_out"])
def test_a_loss_needs_labels(estimator: str) -> None:
    model, batch, task = case("llama")
    bare = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ConfigError, match="labels"):
        score_heads(model, [bare], estimator, task=task)
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ConfigError, match="labelled position"):
        score_heads(model, [none], estimator, task=task)


def test_output_norm_needs_none() -> None:
    model, batch, task = case("llama")
    bare = {name: value for name, value in batch.items() if name != "labels"}
    with_labels = score_heads(model, [batch], "output_norm", task=task)
    assert score_heads(model, [bare], "output_norm", task=task).heads[0].scores == (
        with_labels.heads[0].scores
    )


def test_a_batch_without_labelled_positions_is_left_out() -> None:
    model, batch, task = case("llama")
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    found = score_heads(model, [batch, none], "gate_gradient", task=task)
    assert found.batches == 1
    assert (
        found.heads[0].scores
        == score_heads(model, [batch], "gate_gradient", task=task).heads[0].scores
    )


def test_the_public_names() -> None:
    assert surgery.score_heads is score_heads
    assert surgery.ScoreTable.__module__ == "surgery.importance.table"
