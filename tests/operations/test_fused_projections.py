"""A fused projection equals the separate ones, in every use of a model, and can be undone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.operations.fuse_qkv.projections import FusedPart, fuse_qkv_, is_fused, unfuse_qkv_
from surgery.plan.registry import is_step, run_step
from tests.families import SEPARATE, family, logits, skeleton, tokens

from .fusing import Block, places

TOLERANCE = 1e-12  # fp64; only the blocking of the matrix product differs


def fused(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    fuse_qkv_(changed, places(changed))
    return changed


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    unfuse_qkv_(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SEPARATE)
def test_logits_and_gradients_are_the_same(name: str) -> None:
    model = family(name)
    changed = fused(model)
    assert is_fused(changed)
    assert relative(logits(changed), logits(model)) <= TOLERANCE
    for m in (model, changed):
        m(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
    expected, found = gradients(model), gradients(changed)
    assert found.keys() == expected.keys()
    for key in expected:
        # Gradients that are nothing but rounding have no relative error.
        size = max(float(expected[key].norm()), 1e-6)
        assert float((found[key] - expected[key]).norm()) / size <= 1e-10, key


@pytest.mark.parametrize("name", SEPARATE)
def test_undone_to_the_bit(name: str) -> None:
    model = family(name)
    changed = fused(model)
    unfuse_qkv_(changed)
    assert not is_fused(changed)
    assert list(changed.state_dict()) == list(model.state_dict())
    for a, b in zip(changed.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    assert [(path, type(module)) for path, module in changed.named_modules()] == kinds
    for module in changed.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    assert torch.equal(logits(changed), logits(model))


def test_parameters_appear_once() -> None:
    model = family("llama_biased")
    changed = fused(model)
    names = [name for name, _ in changed.named_parameters() if "layers.0.self_attn" in name]
    assert [name.removeprefix("model.layers.0.self_attn.") for name in names] == [
        "o_proj.weight",
        "o_proj.bias",
        "qkv_proj.weight",
        "qkv_proj.bias",
    ]
    assert set(names) <= set(changed.state_dict())
    assert sum(p.numel() for p in changed.parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_parts_look_like_projections() -> None:
    model = family("llama_biased", num_key_value_heads=2)
    attention, plain = (m.model.layers[1].self_attn for m in (fused(model), model))
    for name in ("q_proj", "k_proj", "v_proj"):
        part, old = getattr(attention, name), getattr(plain, name)
        assert (part.in_features, part.out_features) == (old.in_features, old.out_features)
        assert torch.equal(part.weight, old.weight)
        assert torch.equal(part.bias, old.bias)
        assert part.weight.data_ptr() != old.weight.data_ptr()
    with torch.no_grad():
        attention.k_proj.weight.zero_()  # a view
    assert not attention.qkv_proj.weight[64:80].any()


@pytest.mark.parametrize("name", SEPARATE)
def test_one_product_per_block_and_no_other(name: str) -> None:
    """So no block writes to its input meanwhile, or calls a projection with something else."""
    changed = fused(family(name))
    ours = [f"{site['path']}.qkv_proj" for site in places(changed)]
    calls: list[str] = []
    for path, module in changed.named_modules():
        if path in ours:
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
        elif isinstance(module, FusedPart):
            module.shared._compute_alone = None  # type: ignore[assignment]
    logits(changed)
    with torch.inference_mode():
        changed(input_ids=tokens())
    assert sorted(calls) == sorted(2 * ours)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_with_a_cache(implementation: str) -> None:
    model = family("llama", num_key_value_heads=2)
    model.set_attn_implementation(implementation)
    ids = tokens()
    ids[0, :4] = 0
    kwargs: dict[str, Any] = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    assert torch.equal(fused(model).generate(ids, **kwargs), model.generate(ids, **kwargs))


def test_training_steps() -> None:
    model = family("qwen2").train()
    changed = fused(model)
    for m in (model, changed):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for seed in range(3):
            optimizer.zero_grad()
            m(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
            optimizer.step()
    unfuse_qkv_(changed)
    for a, b in zip(changed.state_dict().values(), model.state_dict().values(), strict=True):
        assert relative(a, b) <= 1e-8  # Adam divides by gradients that are near zero


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = family("llama").train()
    changed = fused(model)
    changed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for m in (model, changed):
        m(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    expected, found = gradients(model), gradients(changed)
    for key in expected:
        assert relative(found[key], expected[key]) <= 1e-10, key


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_whole(grad: bool) -> None:
    model = family("llama")
    changed = fused(model)
    torch.compiler.reset()
    compiled = torch.compile(changed, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        found = compiled(input_ids=tokens(), use_cache=False).logits
        again = compiled(input_ids=tokens(seed=1), use_cache=False).logits
    assert relative(found, logits(model)) <= TOLERANCE
    assert relative(again, logits(model, tokens(seed=1))) <= TOLERANCE


def test_compiled_with_one_product_per_block() -> None:
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found = [n for n in graph.graph.nodes if n.target is torch._C._nn.linear]
        counts.append(len(found))
        return graph.forward

    for model in (family("llama"), fused(family("llama"))):
        torch.compiler.reset()
        torch.compile(model, backend=backend, fullgraph=True)(input_ids=tokens(), use_cache=False)
    plain, less = counts
    assert plain - less == 4  # 2 products in each of 2 layers


def test_autocast() -> None:
    model = family("llama", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = logits(fused(model)), logits(model)
    assert relative(found.float(), expected.float()) <= 0.02


def test_values_changed_in_place_afterwards() -> None:
    """OLMo clamps queries, keys and values where they are."""
    model = family("olmo", clip_qkv=0.5).train()
    changed = fused(model)
    for m in (model, changed):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    expected, found = gradients(model), gradients(changed)
    assert all(relative(found[key], expected[key]) <= 1e-10 for key in expected)


# --- a block of our own, to call in odd ways -----------------------------------------------------


def blocks() -> tuple[Block, Block]:
    torch.manual_seed(0)
    plain = Block().double()
    changed = copy.deepcopy(plain)
    fuse_qkv_(changed, [Block.place()])
    return plain, changed


def inputs(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-14) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq", "qqkv", "qkvqkv", "kk", "qk"])
def test_any_order_of_calls(order: str) -> None:
    plain, changed = blocks()
    x = inputs()
    assert same(changed(x, order=order), plain(x, order=order))


def test_other_inputs_for_keys_and_values() -> None:
    plain, changed = blocks()
    x, y, z = (inputs(seed) for seed in range(3))
    assert same(changed(x, y), plain(x, y))
    assert same(changed(x, y, z), plain(x, y, z))
    assert same(changed(x, x.clone(), z), plain(x, x.clone(), z))


def test_an_input_written_to_between_the_calls() -> None:
    plain, changed = blocks()
    with torch.no_grad():
        assert same(changed(inputs(), write=True), plain(inputs(), write=True))


def test_weights_written_to_between_calls_from_outside() -> None:
    plain, changed = blocks()
    x = inputs()
    for block in (plain, changed):
        block.attn.q(x)
        with torch.no_grad():
            block.attn.k.weight.mul_(2)
    assert same((changed.attn.k(x),), (plain.attn.k(x),))


def test_grad_mode_changed_between_the_calls() -> None:
    plain, changed = blocks()
    x = inputs().requires_grad_()
    for block in (plain, changed):
        q, k, v = block(x, no_grad_first=True)
        assert [t.requires_grad for t in (q, k, v)] == [False, True, True]
    assert same(changed(x, no_grad_first=True), plain(x, no_grad_first=True))


def test_nothing_is_held_after_a_pass() -> None:
    _, changed = blocks()
    x = inputs()
    seen = weakref.ref(x)
    changed(x)
    changed(x, order="q")  # an unfinished one
    del x
    gc.collect()
    assert seen() is None


def test_nothing_is_held_after_an_exception() -> None:
    plain, changed = blocks()
    x = inputs()
    seen = weakref.ref(x)
    with pytest.raises(ValueError, match="midway"):
        changed(x, fail=True)
    del x
    gc.collect()
    assert seen() is None
    assert same(changed(inputs(1)), plain(inputs(1)))


def test_a_block_called_within_itself() -> None:
    plain, changed = blocks()
    assert same(changed(inputs(), within=inputs(1)), plain(inputs(), within=inputs(1)))


def test_checkpointing_that_stops_early() -> None:
    plain, changed = blocks()
    found = []
    for block in (plain, changed):
        x = inputs().requires_grad_()
        q, k, v = checkpoint(block, x, use_reentrant=False)
        (q[..., :4] * k + v).sum().backward()
        found.append(x.grad)
    assert same((found[1],), (found[0],))


def test_copies_are_independent() -> None:
    _, changed = blocks()
    other = copy.deepcopy(changed)
    with torch.no_grad():
        other.attn.qkv_proj.weight.zero_()
        other.attn.qkv_proj.bias.zero_()
    assert not any(t.any() for t in other(inputs()))
    assert all(t.any() for t in changed(inputs()))
    unfuse_qkv_(other)
    assert is_fused(changed)
    assert not other.attn._forward_hooks


def test_a_pickled_model_stays_fused() -> None:
    _, changed = blocks()
    other = pickle.loads(pickle.dumps(changed))
    assert same(other(inputs()), changed(inputs()))
    unfuse_qkv_(other)
    assert not other.attn._forward_hooks


def test_what_wraps_the_fused_projection_is_called() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    plain, changed = blocks()
    changed.attn.qkv_proj = Doubled(changed.attn.qkv_proj)
    x, y = inputs(), inputs(1)
    assert same(changed(x), tuple(2 * t for t in plain(x)))
    assert same(changed(x, y), tuple(2 * t for t in plain(x, y)))
    with pytest.raises(PlanError, match="changed since"):
        unfuse_qkv_(changed)


# --- the step ------------------------------------------------------------------------------------


def test_it_is_a_step_and_does_nothing_twice() -> None:
    assert is_step("fuse_qkv")
    model = family("llama")
    sites = places(model)
    run_step("fuse_qkv", model, {"sites": sites})
    before = [id(module) for module in model.modules()]
    run_step("fuse_qkv", model, {"sites": sites})
    assert [id(module) for module in model.modules()] == before
    assert len(model.model.layers[0].self_attn._forward_hooks) == 1


def test_a_skeleton_can_be_fused() -> None:
    model = skeleton(family("llama"))
    sites = places(model)
    fuse_qkv_(model, sites)
    part = model.model.layers[0].self_attn.q_proj
    assert isinstance(part, FusedPart)
    assert part.weight.is_meta
    unfuse_qkv_(model)
    assert all(p.is_meta for p in model.parameters())


def test_weights_loaded_into_the_fused_model() -> None:
    model = family("llama")
    other = fused(family("llama", seed=1))
    other.load_state_dict(fused(model).state_dict())
    assert relative(logits(other), logits(model)) <= TOLERANCE


def test_moving_and_casting() -> None:
    model = family("llama")
    changed = fused(model).to(torch.float32)
    assert changed.model.layers[0].self_attn.q_proj.weight.dtype is torch.float32
    assert relative(logits(changed).double(), logits(model)) <= 1e-5


def test_gradients_and_settings_survive_both_ways() -> None:
    model = family("llama")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    changed = copy.deepcopy(model)
    attention = changed.model.layers[0].self_attn
    for name in "qkv":
        getattr(attention, f"{name}_proj").weight.requires_grad_(False)
    for a, b in zip(model.parameters(), changed.parameters(), strict=True):
        b.grad = a.grad.clone()
    fuse_qkv_(changed, places(changed))
    assert not attention.qkv_proj.weight.requires_grad
    unfuse_qkv_(changed)
    assert not attention.k_proj.weight.requires_grad
    for a, b in zip(model.parameters(), changed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def broken(change: Any) -> PreTrainedModel:
    model = family("llama")
    change(model.model.layers[1].self_attn)
    return model


def _share(attention: nn.Module) -> None:
    attention.k_proj.weight = attention.v_proj.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: setattr(a, "q_proj", nn.Sequential(a.q_proj)), "only plain Linears"),
        (lambda a: a.q_proj.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda a: a.k_proj.weight.requires_grad_(False), "requires_grad"),
        (lambda a: a.k_proj.float(), "dtypes"),
        (lambda a: setattr(a.k_proj, "bias", nn.Parameter(torch.zeros(64).double())), "biases"),
        (_share, "share weights"),
        (lambda a: setattr(a, "qkv_proj", nn.Linear(1, 1)), "already"),
    ],
    ids=["wrapped", "hooked", "frozen", "dtype", "bias", "shared", "taken"],
)
def test_what_cannot_be_fused_is_refused_whole(change: Any, message: str) -> None:
    model = broken(change)
    with pytest.raises(PlanError, match=message):
        fuse_qkv_(model, places(model))
    assert not is_fused(model)


def test_a_part_that_was_replaced_cannot_be_undone() -> None:
    model = fused(family("llama"))
    model.model.layers[1].self_attn.q_proj = nn.Linear(64, 64)
    with pytest.raises(PlanError, match="changed since"):
        unfuse_qkv_(model)
    assert is_fused(model)
