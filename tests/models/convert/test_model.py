"""A converted model is the same model."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from surgery.errors import ConversionError, PlanError
from surgery.models.convert import convert_config, convert_model
from surgery.models.convert.config import _OWN, _PAIRS
from surgery.verify.conversion import check_conversion
from tests.families import logits, skeleton, tokens

from .moving import ABSOLUTE, ALL, KEPT, NOPE, ROPE, config_of, model_of

TABLES = {
    "gpt2": "transformer.wpe.weight",
    "gpt_bigcode": "transformer.wpe.weight",
    "opt": "model.decoder.embed_positions.weight",
}


def without_positions(model) -> torch.Tensor:
    """Logits of a model whose position table is all zeros."""
    table = TABLES[model.config.model_type]
    zeros = {table: torch.zeros_like(model.get_parameter(table))}
    with torch.no_grad():
        return functional_call(model, zeros, (), {"input_ids": tokens(), "use_cache": False}).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# Norms and rotary angles are computed in fp32 in fp64 models too, by both alike.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("name", "into"), KEPT)
def test_the_logits_are_the_same(name, into, dtype, tolerance) -> None:
    model = model_of(name, dtype)
    assert relative(logits(convert_model(model, into)), logits(model)) <= tolerance


@pytest.mark.parametrize("name", [name for name, into in KEPT if into == "mistral"])
def test_the_same_modules_give_the_same_bits(name) -> None:
    model = model_of(name)
    assert torch.equal(logits(convert_model(model, "mistral")), logits(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_no_positions_are_a_table_of_zeros(name, dtype, tolerance) -> None:
    model = model_of(name, dtype)
    new = convert_model(model, "starcoder2", NOPE)
    assert not new.model.rotary_emb.inv_freq.any()
    assert relative(logits(new), without_positions(model)) <= tolerance


@pytest.mark.parametrize("name", ABSOLUTE)
def test_rotary_positions_make_a_difference(name) -> None:
    model = model_of(name)
    new = convert_model(model, "starcoder2", {"theta": 500.0})
    assert new.config.rope_parameters["rope_theta"] == 500.0
    assert new.config.max_position_embeddings == model.config.max_position_embeddings
    assert relative(logits(new), without_positions(model)) > 1e-3


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_the_check_passes_and_changes_nothing(name, into, positions) -> None:
    model = model_of(name, torch.float32).train()
    new = convert_model(model, into, positions)
    before = [copy.deepcopy(m.state_dict()) for m in (model, new)]
    frequencies = new.model.rotary_emb.inv_freq.clone()
    assert check_conversion(model, new, positions is not None) <= 1e-6
    for m, state in zip((model, new), before, strict=True):
        assert m.training
        assert all(
            torch.equal(a, b) for a, b in zip(m.state_dict().values(), state.values(), strict=True)
        )
    assert torch.equal(new.model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_the_check_notices_one_wrong_matrix(name, into, positions) -> None:
    model = model_of(name, torch.float32)
    new = convert_model(model, into, positions)
    output = new.model.layers[1].self_attn.o_proj
    output.weight = nn.Parameter(output.weight.detach() * 1.1)  # not in place: it may be shared
    with pytest.raises(PlanError, match="does not compute the same"):
        check_conversion(model, new, positions is not None)


@pytest.mark.parametrize(("name", "into"), KEPT)
def test_generation_with_a_cache_is_the_same(name, into) -> None:
    model = model_of(name)
    model.generation_config.max_new_tokens = 20
    model.generation_config.do_sample = False
    new = convert_model(model, into)
    assert new.generation_config is not model.generation_config
    assert new.generation_config.to_dict() == model.generation_config.to_dict()
    inputs = tokens()
    inputs[0, :4] = 0
    mask = (inputs != 0).long()
    kwargs = {"attention_mask": mask, "eos_token_id": None}
    assert torch.equal(new.generate(inputs, **kwargs), model.generate(inputs, **kwargs))


def test_a_renamed_tensor_is_shared_and_others_are_not() -> None:
    model = model_of("llama_tied")
    new = convert_model(model, "phi3")
    attention, old = new.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert attention.o_proj.weight.data_ptr() == old.o_proj.weight.data_ptr()
    assert attention.o_proj.weight is not old.o_proj.weight
    whole = torch.cat([old.q_proj.weight, old.k_proj.weight, old.v_proj.weight])
    assert torch.equal(attention.qkv_proj.weight, whole)


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_ties_gradients_dtype_and_mode_stay(name, into, positions) -> None:
    model = model_of(name, torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    new = convert_model(model.train(), into, positions)
    tied = new.lm_head.weight is new.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not new.get_input_embeddings().weight.requires_grad
    assert new.model.norm.weight.requires_grad
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.model.rotary_emb.inv_freq.dtype is torch.float32
    assert all(module.training for module in new.modules())
    assert not any(p.is_meta for p in [*new.parameters(), *new.buffers()])


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_a_skeleton_moves_too(name, into, positions) -> None:
    model = model_of(name)
    new, moved = (
        convert_model(model, into, positions),
        convert_model(skeleton(model), into, positions),
    )
    assert all(p.is_meta for p in moved.parameters())
    shapes = {n: p.shape for n, p in new.named_parameters()}
    assert shapes == {n: p.shape for n, p in moved.named_parameters()}
    assert moved.config.to_dict() == new.config.to_dict()


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_the_config_alone_builds_the_same_model(name, into, positions) -> None:
    model = model_of(name, torch.float32)
    new = convert_model(model, into, positions)
    fresh = AutoModelForCausalLM.from_config(convert_config(model.config, into, positions))
    fresh.load_state_dict(new.state_dict())
    assert torch.equal(logits(fresh.eval()), logits(new))


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_training_is_the_same(name, into, positions) -> None:
    """Dropouts have the same probabilities; without them, the gradients agree."""
    if positions is not None:
        model = model_of(name, attention_dropout=0.3) if "opt" in name else model_of(name)
        config = convert_model(model, into, positions).config
        source = model.config
        assert config.residual_dropout == getattr(source, "resid_pdrop", None) or source.dropout
        assert config.attention_dropout == getattr(source, "attn_pdrop", 0.3)
        assert config.embedding_dropout == getattr(source, "embd_pdrop", 0.0)
        return
    model = model_of(name)
    new = copy.deepcopy(convert_model(model, into))
    for m in (model, new):
        m.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    a, b = model.model.layers[0].self_attn, new.model.layers[0].self_attn
    assert relative(b.o_proj.weight.grad, a.o_proj.weight.grad) <= 1e-12
    if into == "phi3":
        parts = [getattr(a, f"{part}_proj").weight.grad for part in "qkv"]
        assert relative(b.qkv_proj.weight.grad, torch.cat(parts)) <= 1e-12


@pytest.mark.parametrize("pair", _PAIRS.values(), ids=lambda pair: f"{pair.source}-{pair.target}")
def test_every_field_of_the_new_config_is_accounted_for(pair) -> None:
    """Read from the source, or named in the pair: none is left at the target's default."""
    source = CONFIG_MAPPING[pair.source]()
    for field in fields(CONFIG_MAPPING[pair.target]):
        known = field.name in pair.fields or field.name in _OWN or hasattr(source, field.name)
        assert known or field.name == "rope_parameters", field.name  # positions say that one


def test_gradient_checkpointing_goes_along() -> None:
    model = model_of("llama")
    model.gradient_checkpointing_enable()
    assert convert_model(model, "mistral").model.layers[0].gradient_checkpointing


def test_the_attention_implementation_goes_along() -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    assert convert_model(model, "phi3").config._attn_implementation == "eager"


def test_a_partial_factor_that_llama_passes_over_is_not_handed_to_phi3() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = model_of("llama", rope_parameters=rope)
    assert relative(logits(convert_model(model, "phi3")), logits(model)) <= 1e-12


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_moves_to_mistral_and_not_to_phi3(rope) -> None:
    model = model_of("llama", rope_parameters={"rope_theta": 1e4} | rope)
    assert torch.equal(logits(convert_model(model, "mistral")), logits(model))
    with pytest.raises(ConversionError, match="rope_parameters"):
        convert_model(model, "phi3")


def test_the_source_is_left_as_it_is() -> None:
    model = model_of("gpt2")
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    convert_model(model, "starcoder2", ROPE)
    assert model.config.to_dict() == config
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_a_model_changed_beforehand_is_refused() -> None:
    model = model_of("llama")
    model.model.layers[0].self_attn.k_proj = nn.Linear(64, 32, bias=False).double()
    with pytest.raises(PlanError, match=r"k_proj.*should be \[64, 64\]"):
        convert_model(model, "mistral")
    with pytest.raises(PlanError, match="rows"):
        convert_model(model, "phi3")
    model = model_of("llama")
    model.model.layers[0].self_attn.extra = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"extra.*must not be there"):
        convert_model(model, "mistral")
    model = model_of("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(PlanError, match=r"lm_head\.weight"):
        convert_model(model, "mistral")


def test_partly_trained_projections_cannot_be_one() -> None:
    model = model_of("llama")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    with pytest.raises(PlanError, match="only some of its sources are trained"):
        convert_model(model, "phi3")


def test_another_task_is_refused() -> None:
    with pytest.raises(ConversionError, match="LlamaForCausalLM"):
        convert_model(model_of("llama").model, "mistral")
    assert config_of("llama").model_type == "llama"
