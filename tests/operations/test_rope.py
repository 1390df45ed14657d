"""The operation `rope`: what it plans, on many architectures, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from surgery.errors import ConfigError
from surgery.plan.registry import parse_operations
from tests.families import _BASE, family, logits, randomised, tokens
from tests.operations.rope_models import built_from, decoded, draft_of, rope_, without_rotation

FAMILIES = [
    "llama",
    "cohere",
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_oss",
    "granite",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
    "falcon_h1",
    "minimax",
]
# Longer than the 64 positions the models have, so that what depends on the length shows.
LONG = tokens(2, 90)


def pairs(model: PreTrainedModel) -> int:
    """Rotated pairs of dimensions per head."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2


def options(kind: str, model: PreTrainedModel) -> dict[str, Any]:
    n = pairs(model)
    return {
        "default": {"theta": 123456.0, "max_position_embeddings": 100},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "beta_fast": 16.0, "attention_factor": 1.2},
        "longrope": {
            "factor": 2.0,
            "short_factor": [1.0 + 0.1 * i for i in range(n)],
            "long_factor": [2.0 + i for i in range(n)],
        },
        "llama3": {"factor": 2.0},
        "none": {},
    }[kind] | {"type": kind}


KINDS = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_is_what_the_patched_config_builds(name: str, kind: str) -> None:
    model = family(name)
    draft = draft_of(model, **options(kind, model))
    if draft.steps:
        assert [step.kind for step in draft.steps] == ["site_rope"]
        assert kind == "none"
        assert name == "phi"
        return
    expected = logits(built_from(model, draft.patch), LONG)
    before = logits(model, LONG)
    after = logits(rope_(model, **options(kind, model)), LONG)
    assert torch.equal(after, expected)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_survives_saving(name: str, kind: str, tmp_path: Path) -> None:
    model = family(name, dtype=torch.float32)
    rope_(model, **options(kind, model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(logits(loaded, LONG), logits(model, LONG))


@pytest.mark.parametrize("name", FAMILIES)
def test_nope_is_no_rotation(name: str) -> None:
    model = family(name)
    with without_rotation(model):
        expected = logits(model)
    torch.testing.assert_close(logits(rope_(model, type="none")), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_default_with_the_same_theta_is_the_identity(name: str) -> None:
    model = family(name)
    parameters = model.config.rope_parameters
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    theta = parameters.get("rope_theta")  # none where each layer type has its own
    draft = draft_of(model, type="default", theta=theta)
    assert not draft.patch
    assert not draft.steps
    assert draft.notes
    assert torch.equal(logits(rope_(model, type="default", theta=theta)), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4", "mixtral"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "none"])
def test_decoding_with_a_cache(name: str, kind: str) -> None:
    model = family(name)
    rope_(model, type=kind, **({} if kind == "none" else {"factor": 2.0}))
    ids = tokens(2, 12)
    torch.testing.assert_close(decoded(model, ids, 5), logits(model, ids), atol=1e-6, rtol=1e-6)


def test_lengths() -> None:
    model = family("llama")
    assert draft_of(model, type="linear", factor=4.0).patch["max_position_embeddings"] == 256
    # transformers' dynamic scaling starts where max_position_embeddings ends.
    assert "max_position_embeddings" not in draft_of(model, type="dynamic", factor=4.0).patch
    patch = draft_of(model, type="yarn", factor=4.0, max_position_embeddings=200).patch
    assert patch["max_position_embeddings"] == 200
    assert patch["rope_parameters"]["original_max_position_embeddings"] == 64


def test_the_original_length_is_kept_when_applied_again() -> None:
    model = rope_(family("llama"), type="yarn", factor=2.0)
    assert model.config.max_position_embeddings == 128
    assert not draft_of(model, type="yarn", factor=2.0).patch
    rope_(model, type="yarn", factor=4.0)
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    rope_(model, type="dynamic", factor=2.0)
    assert model.config.max_position_embeddings == 64
    rope_(model, type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    rope_(model, type="default")
    assert model.config.max_position_embeddings == 64
    assert torch.equal(logits(model), logits(family("llama")))


def test_phi3_holds_the_original_length_beside() -> None:
    config = AutoConfig.for_model("phi3", **_BASE)
    model = randomised(AutoModelForCausalLM.from_config(config), 0, torch.float64)
    with pytest.raises(ConfigError, match="a saved phi3 config does not keep it"):
        draft_of(model, type="yarn", factor=2.0)
    rope_(model, type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    again = type(config).from_dict(model.config.to_dict())
    assert again.rope_parameters["original_max_position_embeddings"] == 64


def test_one_layer_type() -> None:
    model = family("gemma3", layer_types=["sliding_attention", "full_attention"])
    patch = draft_of(model, type="linear", factor=2.0, layer_type="full_attention").patch
    new, old = patch["rope_parameters"], model.config.rope_parameters
    assert new["sliding_attention"] == old["sliding_attention"]
    assert new["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}


def test_own_keys_and_widths_are_kept() -> None:
    model = family(
        "glm4",
        rope_parameters={
            "rope_theta": 1e4,
            "rope_type": "default",
            "own": 3,
            "partial_rotary_factor": 0.5,
        },
    )
    new = draft_of(model, type="linear", factor=2.0).patch["rope_parameters"]
    assert new["own"] == 3
    assert new["partial_rotary_factor"] == 0.5


def test_rotary_width_held_in_attention_blocks() -> None:
    model = family("phi")
    draft = draft_of(model, type="default", partial_rotary_factor=0.25)
    expected = logits(built_from(model, draft.patch))
    rope_(model, type="default", partial_rotary_factor=0.25)
    assert torch.equal(logits(model), expected)


def test_head_dim_is_written_where_a_formula_needs_it() -> None:
    model = family("mixtral")
    assert model.config.head_dim is None
    assert draft_of(model, type="yarn", factor=2.0).patch["head_dim"] == 8
    assert "head_dim" not in draft_of(model, type="linear", factor=2.0).patch


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"type": "yarn"}, "factor"),
    ("llama", {"type": "linear", "factor": 1.0}, "factor"),
    ("llama", {"type": "linear", "factor": -2.0}, "factor"),
    ("llama", {"type": "default", "factor": 2.0}, "factor"),
    ("llama", {"type": "none", "theta": 1e4}, "theta"),
    ("llama", {"type": "default", "theta": -1.0}, "theta"),
    ("llama", {"type": "llama3"}, "factor"),
    ("llama", {"type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast"),
    ("llama", {"type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
    ("llama", {"type": "yarn", "factor": 2.0, "mscale": 1.0}, "mscale"),
    ("llama", {"type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor"),
    ("llama", {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "high_freq_factor"),
    ("llama", {"type": "longrope", "factor": 2.0, "long_factor": [1.0] * 4}, "short_factor"),
    (
        "llama",
        {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 4},
        "long_factor",
    ),
    (
        "llama",
        {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3},
        "short_factor",
    ),
    ("llama", {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "factor"),
    ("llama", {"type": "proportional"}, "partial_rotary_factor"),
    ("llama", {"type": "proportional", "partial_rotary_factor": 0.1}, "partial_rotary_factor"),
    ("llama", {"type": "default", "partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    ("llama", {"type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ("glm4", {"type": "default", "partial_rotary_factor": 0.4}, "partial_rotary_factor"),
    ("llama", {"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        "llama",
        {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    (
        "minimax",
        {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    ("phi", {"type": "proportional", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ("llama", {"type": "default", "max_position_embeddings": 32}, "max_position_embeddings"),
    (
        "llama",
        {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 128},
        "max_position_embeddings",
    ),
    ("stablelm", {"type": "dynamic", "factor": 2.0}, "type"),
    ("llama", {"type": "default", "layer_type": "full_attention"}, "layer_type"),
    ("gemma3", {"type": "default", "layer_type": "local"}, "layer_type"),
    ("gemma3", {"type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
    ("gemma3", {"type": "none", "layer_type": "full_attention", "layers": [0]}, "layer_type"),
    ("llama", {"type": "none", "layers": [2]}, "layers"),
    ("llama", {"type": "none", "layers": []}, "layers"),
    ("smollm3_partly", {"type": "none", "layers": [1]}, "layers"),
    (
        "phi",
        {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25, "layers": [0]},
        "partial_rotary_factor",
    ),
    ("linear", {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
    (
        "yarn",
        {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 48},
        "original_max_position_embeddings",
    ),
    ("llama", {"type": "wavy"}, "type"),
]


def _bad_model(name: str) -> PreTrainedModel:
    if name in ("linear", "yarn"):
        return rope_(family("llama"), type=name, factor=2.0)
    if name == "smollm3_partly":
        return family("smollm3", no_rope_layers=[1, 0])
    return family(name)


@pytest.mark.parametrize(("name", "given", "key"), BAD)
def test_refuses(name: str, given: dict[str, Any], key: str) -> None:
    model = _bad_model(name)
    with pytest.raises(ConfigError) as caught:
        draft_of(model, **given)
    assert caught.value.key == f"attention.rope.{key}"
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 400


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 8}),
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4}),
        ("bloom", {"n_layer": 2, "n_head": 8}),
        ("falcon", {"alibi": True}),
        ("opt", {}),
        ("bert", {}),
    ],
)
def test_refuses_models_without_rotary_embeddings(kind: str, fields: dict[str, Any]) -> None:
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **(_BASE | fields)))
    with pytest.raises(ConfigError, match="no rotary embedding"):
        draft_of(model, type="yarn", factor=2.0)


def _model(kind: str, **fields: Any) -> PreTrainedModel:
    auto = AutoModelForMaskedLM if kind == "modernbert" else AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **(_BASE | fields))
    return randomised(auto.from_config(config), 0, torch.float64)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt_neox", {}),
        ("falcon", {}),
        ("nemotron", {}),
        ("olmo3", {"sliding_window": 6}),
        ("modernbert", {"sep_token_id": 2, "cls_token_id": 1}),
    ],
)
@pytest.mark.parametrize("how", [{"type": "yarn", "factor": 2.0}, {"type": "none"}])
def test_fused_and_bidirectional_architectures(
    kind: str, fields: dict[str, Any], how: dict[str, Any]
) -> None:
    model = _model(kind, **fields)
    expected = built_from(model, draft_of(model, **how).patch)
    rope_(model, **how)
    with torch.no_grad():
        actual, wanted = (one(input_ids=LONG).logits for one in (model, expected))
    assert torch.equal(actual, wanted)


def test_single_layers_need_position_ids() -> None:
    model = _model("modernbert", sep_token_id=2, cls_token_id=1)
    with pytest.raises(ConfigError, match="no position_ids reach"):
        draft_of(model, type="linear", factor=2.0, layers=[1])
    assert draft_of(model, type="none", layers=[1]).steps[0].kind == "site_rope"


def test_the_text_part_of_a_larger_config() -> None:
    text = _BASE | {"head_dim": 8, "sliding_window": 6}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = randomised(Gemma3ForConditionalGeneration(config), 0, torch.float64)
    draft = draft_of(model, type="linear", factor=2.0)
    assert set(draft.patch) == {
        "text_config.rope_parameters",
        "text_config.max_position_embeddings",
    }
    assert not draft.steps
    expected = logits(built_from(model, draft.patch))
    assert torch.equal(logits(rope_(model, type="linear", factor=2.0)), expected)


def test_a_stated_original_length_helps() -> None:
    model = rope_(family("llama"), type="linear", factor=2.0)
    rope_(model, type="yarn", factor=4.0, original_max_position_embeddings=64)
    assert model.config.max_position_embeddings == 256


def test_its_spec_is_plain() -> None:
    (operation,) = parse_operations({"rope": {"type": "linear", "factor": 2}})
    assert operation.to_json()["type"] == "linear"
    assert operation.to_json()["factor"] == 2.0
