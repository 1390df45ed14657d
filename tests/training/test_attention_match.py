"""The attention term of distillation, against what it says it is, written out plainly."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedModel

from surgery.config.schema import ObjectiveConfig, ObjectiveName, Task
from surgery.errors import ConfigError, SurgeryError
from surgery.execute.live import apply_
from surgery.operations.backend.switch import set_backend
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from surgery.training.objectives import Loss, compute_training_loss
from surgery.training.pairs import pair_sites, pair_with_original
from tests.tiny_models import tiny_model, tokens

IDS = tokens(2, 9)
CFG = ObjectiveConfig(ObjectiveName.distill, 1.0, 0.0, attention_weight=1.0, teacher=None)


def _operated(model: PreTrainedModel, **attention: Any) -> tuple[PreTrainedModel, Plan]:
    plan = make_plan(model, parse_operations(attention))
    return apply_(model, plan), plan


def _term(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Any,
    task: Task = Task.causal_lm,
    cfg: ObjectiveConfig = CFG,
    **batch: torch.Tensor,
) -> Loss:
    batch = {"input_ids": IDS, "labels": IDS} | batch
    return compute_training_loss(student, teacher, batch, cfg, task, pairs)


def _blocks(model: PreTrainedModel, ids: torch.Tensor, blocks: list[Any]) -> list[torch.Tensor]:
    """What the attention modules themselves return: the second of two ways to see it."""
    seen: list[torch.Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: seen.append(out[0])) for b in blocks]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _llama_blocks(model: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _reference(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[torch.Tensor]
) -> torch.Tensor:
    """Row by row without padding, in fp64."""
    layers = len(student.model.layers)
    errors, sizes = [0.0] * layers, [0.0] * layers
    for row in rows:
        outputs = _blocks(student, row[None], _llama_blocks(student))
        with torch.no_grad():
            targets = _blocks(teacher, row[None], _llama_blocks(teacher))
        for n, (y, t) in enumerate(zip(outputs, targets, strict=True)):
            for place in range(row.shape[0]):
                difference = y[0, place].double() - t[0, place].double()
                errors[n] = errors[n] + difference @ difference
                sizes[n] = sizes[n] + t[0, place].double() @ t[0, place].double()
    return sum(e / s for e, s in zip(errors, sizes, strict=True)) / layers


def _gradients(value: torch.Tensor, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_value_and_gradient_are_those_of_the_formula() -> None:
    student, plan = _operated(tiny_model("llama"), gqa={"kv_heads": 1})
    teacher = tiny_model("llama", seed=1).eval()
    found = _term(student, teacher, pair_with_original(plan))
    expected = _reference(student, teacher, list(IDS))
    torch.testing.assert_close(
        found.parts["attention"].double(), expected.detach(), rtol=1e-5, atol=0
    )
    # Without the term, the rest of the loss; what is left is the term's.
    whole = _gradients(found.total, student)
    rest = _gradients(_term(student, teacher, []).total, student)
    alone = _gradients(expected, student)
    assert alone
    for name, gradient in whole.items():
        share = alone.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, rest[name] + share, rtol=1e-4, atol=1e-5, msg=name)
    assert any(share.abs().max() > 1e-2 for share in alone.values())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_weight_weighs() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    cfg = ObjectiveConfig(ObjectiveName.distill, 1.0, 0.3, attention_weight=2.5, teacher=None)
    loss = _term(student, teacher, pairs, cfg=cfg)
    parts = loss.parts
    expected = 0.7 * parts["kl"] + 0.3 * parts["label_loss"] + 2.5 * parts["attention"]
    torch.testing.assert_close(loss.total.detach(), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "bloom", "modernbert"])
def test_it_is_nothing_between_equals(name: str) -> None:
    student, teacher = (tiny_model(name, "eager").eval() for _ in range(2))
    pairs = pair_with_original(make_plan(student, []))
    task = Task.masked_lm if name == "modernbert" else Task.causal_lm
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    loss = _term(student, teacher, pairs, task, attention_mask=mask)
    assert len(pairs) == 2
    assert loss.parts["attention"] == 0


def test_padding_does_not_count() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    values = []
    for filler in (0, 7):
        ids = torch.where(mask.bool(), IDS, filler)
        labels = torch.where(mask.bool(), IDS, -100)
        loss = _term(student, teacher, pairs, input_ids=ids, labels=labels, attention_mask=mask)
        values.append(loss.parts["attention"])
    assert torch.equal(*values)
    expected = _reference(student, teacher, [IDS[0], IDS[1, :5]]).detach()
    torch.testing.assert_close(values[0].double(), expected, rtol=1e-5, atol=0)
    assert not torch.isclose(values[0], _term(student, teacher, pairs).parts["attention"])


def test_another_architecture_is_matched_block_by_block() -> None:
    """GPT-2's positions become rotary: the same blocks, by other names."""
    plan = make_plan(tiny_model("gpt2"), parse_operations({"absolute_to_rope": {"theta": 1e4}}))
    student, teacher = apply_(tiny_model("gpt2"), plan), tiny_model("gpt2").eval()
    pairs = pair_with_original(plan)
    assert pairs == [
        (f"model.layers.{n}.self_attn.o_proj", f"transformer.h.{n}.attn.c_proj") for n in (0, 1)
    ]
    assert _term(student, teacher, pairs).parts["attention"] > 0


@pytest.mark.parametrize("attention", [{"rehouse": {"into": "phi3"}}, {"fuse_qkv": {}}])
def test_what_changes_nothing_costs_nothing(attention: dict[str, Any]) -> None:
    """Queries, keys and values in one product: rounding at most."""
    student, plan = _operated(tiny_model("llama"), **attention)
    teacher = tiny_model("llama").eval()
    assert _term(student, teacher, pair_with_original(plan)).parts["attention"] < 1e-10


def test_removed_attention_is_left_out() -> None:
    heads = {"heads": {0: [0, 1, 2, 3], 1: [0, 1]}, "remove_attention": True}
    student, plan = _operated(tiny_model("llama"), prune_heads=heads)
    pairs = pair_with_original(plan)
    assert pairs == [("model.layers.1.self_attn.o_proj",) * 2]
    assert _term(student, tiny_model("llama").eval(), pairs).parts["attention"] > 0


def _albert(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=48,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AlbertForMaskedLM(config)


def test_a_shared_block_counts_once_with_all_its_calls() -> None:
    student, teacher = _albert(0).train(), _albert(1).eval()
    ((path, _),) = pairs = pair_with_original(make_plan(student, []))
    outputs: list[list[torch.Tensor]] = []
    for model in (student, teacher):
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))  # noqa: B023
        model(input_ids=IDS)
        handle.remove()
        outputs.append([y.detach().double() for y in seen])
    assert len(outputs[0]) == 3
    expected = torch.stack([(y - t).square().sum() for y, t in zip(*outputs, strict=True)]).sum()
    expected /= torch.stack([t.square().sum() for t in outputs[1]]).sum()
    found = _term(student, teacher, pairs, Task.masked_lm).parts["attention"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    plain = _gradients(_term(student, teacher, pairs).total, student)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = _gradients(_term(student, teacher, pairs).total, student)
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, msg=name)


def test_reentrant_checkpointing_is_refused() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(SurgeryError, match="use_reentrant"):
        _term(student, teacher, pairs)


def test_the_comparison_of_a_first_batch_is_not_taken_for_it() -> None:
    """A chosen backend runs the model on an excerpt of its own, before the step's pass."""
    teacher = tiny_model("llama", seed=1).eval()
    plain, checked = tiny_model("llama"), tiny_model("llama", attention="eager")
    set_backend(checked, "sdpa", check=True)
    pairs = pair_with_original(make_plan(plain, []))
    ids = tokens(5, 9)  # more rows than an excerpt has
    found, expected = (
        _term(m, teacher, pairs, input_ids=ids, labels=ids) for m in (checked, plain)
    )
    assert torch.equal(found.parts["attention"], expected.parts["attention"])


def test_nothing_is_held_on_to() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    kept: list[weakref.ref[torch.Tensor]] = []
    for model in (student, teacher):
        module = model.model.layers[0].self_attn.o_proj
        module.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    before = [_hooks(model) for model in (student, teacher)]
    gc.disable()
    try:
        loss = _term(student, teacher, pairs)
        loss.total.backward()
        del loss
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
    assert [_hooks(model) for model in (student, teacher)] == before


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_when_the_model_fails() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    with pytest.raises(IndexError):
        _term(student, teacher, pair_with_original(make_plan(student, [])), input_ids=IDS + 100)
    assert _hooks(student) == _hooks(teacher) == 0


def test_under_autocast_the_error_is_counted_in_fp32() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    pairs = pair_with_original(make_plan(student, []))
    exact = _term(student, teacher, pairs).parts["attention"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _term(student, teacher, pairs)
    assert loss.parts["attention"].dtype is torch.float32
    torch.testing.assert_close(loss.parts["attention"], exact, rtol=2e-2, atol=0)
    loss.total.backward()


def test_an_output_that_is_written_to_is_refused() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    block = student.model.layers[1].self_attn
    block.register_forward_hook(lambda m, a, out: (out[0].mul_(2.0), *out[1:]))
    with pytest.raises(SurgeryError, match=r"writes to the output of model\.layers\.1"):
        _term(student, teacher, pair_with_original(make_plan(student, [])))


def test_a_block_that_is_not_called_is_refused() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1).eval()
    student.spare = torch.nn.Linear(32, 32)
    with pytest.raises(SurgeryError, match="spare is called 0 times"):
        _term(student, teacher, [("spare", "model.layers.1.self_attn.o_proj")])


def _paths(model: PreTrainedModel) -> dict[str, str]:
    return {site.path: site.output.path for site in make_plan(model, []).source}


def test_other_teachers_are_paired_by_name_then_by_order() -> None:
    heads = {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}
    plan = make_plan(tiny_model("llama"), parse_operations({"prune_heads": heads}))
    second = "model.layers.1.self_attn.o_proj"
    assert pair_sites(plan, _paths(tiny_model("qwen3"))) == [(second, second)]
    # By order of the source, since the result has lost one.
    assert pair_sites(plan, _paths(tiny_model("gpt2"))) == [(second, "transformer.h.1.attn.c_proj")]
    one = _paths(tiny_model("gpt2", n_layer=1))
    assert pair_sites(plan, one) == [(second, "transformer.h.0.attn.c_proj")]


def test_a_deeper_teacher_is_no_match_by_name() -> None:
    plan = make_plan(tiny_model("llama"), [])
    deeper = _paths(tiny_model("llama", num_hidden_layers=4))
    with pytest.raises(ConfigError, match="2 in the model, 4 in the teacher"):
        pair_sites(plan, deeper, same_depth=False)


def test_a_model_without_attention_has_nothing_to_match() -> None:
    heads = {"heads": [0, 1, 2, 3], "remove_attention": True}
    plan = make_plan(tiny_model("llama"), parse_operations({"prune_heads": heads}))
    with pytest.raises(ConfigError, match="no attention to match"):
        pair_with_original(plan)
