"""All layers fitted together: what the steps see, what they move, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel, ViTConfig, ViTForImageClassification

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.calibration.folds import Folds
from surgery.calibration.joint import SEEN, Student, Text, fit_jointly
from surgery.calibration.stream import take_first_row
from surgery.execute.live import apply_
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.calibration.models import batches, made, plan_for, unseen
from tests.families import logits, tokens

FITTED = Calibration(refine_steps=0, joint_steps=4)
CLOSED = Calibration(refine_steps=0, joint_steps=0)
MERGE: dict[str, Any] = {"gqa": {"kv_heads": 2, "merge": "optimal"}}
PRUNE: dict[str, Any] = {"prune_heads": {"heads": [1, 4], "refit": True}}
CHAINS: dict[str, dict[str, Any]] = {
    "merge": MERGE,
    "prune": PRUNE,
    "after a whole layer went": {
        "prune_heads": {"heads": {0: list(range(8))}, "remove_attention": True},
        **MERGE,
    },
    "before fusing": {**MERGE, "fuse_qkv": {}},
    "after other positions": {"rope": {"type": "linear", "factor": 2.0}, **PRUNE},
}
KINDS = ("llama", "gpt2", "bert", "gpt_neox", "opt")


def plan_with(model: PreTrainedModel, operations: dict[str, Any], options: Calibration) -> Plan:
    return plan_for(model, None, options, operations=operations)


def joint(plan: Plan) -> list[dict[str, float]]:
    assert plan.calibration is not None
    found = [one["joint"] for one in plan.calibration["operations"] if "joint" in one]
    return [figures for figures in found if "skipped" not in figures]


def skipped(plan: Plan) -> list[str]:
    assert plan.calibration is not None
    found = [one["joint"] for one in plan.calibration["operations"] if "joint" in one]
    return [figures["skipped"] for figures in found if "skipped" in figures]


def predict(student: Student, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return student.predict(student.make_parameters(tensors), {"input_ids": unseen()})


@pytest.mark.parametrize(
    ("kind", "chain"), [(kind, "prune") for kind in KINDS] + [("llama", name) for name in CHAINS]
)
def test_the_student_is_what_the_plan_makes(kind: str, chain: str) -> None:
    model = made(kind)
    plan = plan_with(model, CHAINS[chain], CLOSED)
    student = Student(model, plan, list(plan.tensors))
    expected = logits(apply_(copy.deepcopy(model), plan).eval(), unseen())
    torch.testing.assert_close(predict(student, {}).double(), expected.double())
    moved = {name: tensor * 1.1 for name, tensor in plan.tensors.items()}
    assert not torch.allclose(predict(student, moved).double(), expected.double(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_steps_lead_back_to_the_original(kind: str) -> None:
    """Tensors that lose nothing, then moved away from that."""
    model = made(kind, dtype=torch.float32)
    operations = {"prune_heads": {"heads": [1], "refit": True}}
    plan = plan_with(model, operations, CLOSED)
    original = apply_(copy.deepcopy(model), plan).eval()
    torch.manual_seed(0)
    off = {name: t + 0.05 * t.std() * torch.randn_like(t) for name, t in plan.tensors.items()}
    fit = fit_jointly(Student(model, plan, list(off)), Text(original, batches(16)), off, steps=96)
    assert fit.figures["kl_after"] < 0.5 * fit.figures["kl_before"]
    for name, tensor in plan.tensors.items():
        if tensor.ndim == 2:
            assert (fit.tensors[name] - tensor).norm() < (off[name] - tensor).norm()


@pytest.mark.parametrize("chain", CHAINS)
def test_a_plan_says_what_it_gained(chain: str) -> None:
    model = made("llama", dtype=torch.float32)
    plan = plan_for(model, batches(8), FITTED, operations=CHAINS[chain])
    (figures,) = joint(plan)
    assert figures["kl_after"] <= figures["kl_before"]
    assert (figures["steps"] > 0) == (figures["kl_after"] < figures["kl_before"])
    assert apply_(model, plan) is not None


def test_a_published_merge_stays_what_was_published() -> None:
    model = made("llama", dtype=torch.float32)
    operations = {"gqa": {"kv_heads": 2, "merge": "aligned"}}
    made_plans = [plan_with(model, operations, options) for options in (CLOSED, FITTED)]
    assert not joint(made_plans[1])
    for name, tensor in made_plans[0].tensors.items():
        assert torch.equal(tensor, made_plans[1].tensors[name])


def test_the_model_and_its_gradients_are_left_alone() -> None:
    model = made("llama", dtype=torch.float32).requires_grad_()
    before = copy.deepcopy(model.state_dict())
    plan = plan_with(model, MERGE, FITTED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.requires_grad for tensor in plan.tensors.values())


def test_a_model_without_predictions_keeps_the_closed_form() -> None:
    model = AutoModel.from_config(made("llama").config).eval()
    plan = plan_with(model, MERGE, FITTED)
    assert not joint(plan)
    assert skipped(plan) == ["the model returns no logits"]


def test_too_few_tokens_keep_the_closed_form() -> None:
    model = made("llama", dtype=torch.float32)
    data = batches(1, size=2)
    plans = [
        make_calibrated_plan(model, parse_operations(PRUNE), data, options)
        for options in (CLOSED, FITTED)
    ]
    assert not joint(plans[1])
    assert skipped(plans[1]) == ["too few distinct tokens"]
    for name, tensor in plans[0].tensors.items():
        assert torch.equal(tensor, plans[1].tensors[name])


def test_without_memory_for_a_backward_pass_the_closed_form_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = made("llama", dtype=torch.float32)
    closed = plan_with(model, PRUNE, CLOSED)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    plan = plan_with(model, PRUNE, FITTED)
    assert not joint(plan)
    assert "not enough memory" in skipped(plan)[0]
    assert "left out: not enough memory" in capsys.readouterr().out
    for name, tensor in closed.tensors.items():
        assert torch.equal(tensor, plan.tensors[name])


def test_steps_see_neither_padding_nor_held_out_nor_repeated_text() -> None:
    """Other tokens at those places change nothing of what a causal model's steps see before."""
    model = made("llama", dtype=torch.float32)
    data = [{"input_ids": tokens(2, 40, n), "attention_mask": torch.ones(2, 40)} for n in range(4)]
    data[0]["attention_mask"][:, 30:] = 0
    data.append(dict(data[1]))
    text, folds = Text(model, data), Folds(data)
    assert (text.seen, text.held_out) == ([0, 1, 2], [3])
    plan = plan_with(model, PRUNE, CLOSED)
    student = Student(model, plan, list(plan.tensors))
    counts = [len(text.compare(student, {}, number, SEEN)) for number in range(4)]
    wanted = [
        int(((of := folds.get(n, 40)) < folds.count - 1).logical_and(of >= 0).sum())
        for n in range(4)
    ]
    padding = int((folds.get(0, 40)[:, 30:] < folds.count - 1).sum())
    assert counts == [wanted[0] - padding, *wanted[1:]]


def test_rows_lie_on_the_first_axis_only_where_there_is_one_for_each() -> None:
    """A tensor that holds for the whole batch is not cut."""
    batch = {"input_ids": tokens(4, 10, 1), "scale": torch.tensor(2.0), "axes": torch.zeros(3, 4)}
    row = take_first_row(batch)
    assert [tuple(tensor.shape) for tensor in row.values()] == [(1, 10), (), (3, 4)]


def test_images_are_fitted_too() -> None:
    """Nobody counts their tokens, so nobody says that they are too few."""
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32}
    config = ViTConfig(num_hidden_layers=2, num_attention_heads=8, num_labels=5, **sizes)
    model = ViTForImageClassification(config).eval()
    data = [{"pixel_values": pixels} for pixels in torch.randn(8, 4, 3, 16, 16)]
    plan = make_calibrated_plan(model, parse_operations(PRUNE), data, FITTED)
    (figures,) = joint(plan)
    assert figures["kl_after"] <= figures["kl_before"]
