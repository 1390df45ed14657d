"""Attention that is no site: each block is named with a reason, none is passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from surgery.models.sites import find_sites
from tests.families import family

_SMALL = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def on_meta(model_type: str, auto: Any = AutoModelForCausalLM, **fields: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "found"),
    [("deepseek_v2", "kv_a_proj_with_mqa"), ("deepseek_v3", "kv_b_proj")],
)
def test_latent_projections(model_type: str, found: str) -> None:
    anatomy = find_sites(on_meta(model_type, num_hidden_layers=2))
    assert anatomy.sites == ()
    assert len(anatomy.unreadable) == 2
    for block in anatomy.unreadable:
        assert "no query, key and value projections are recognised" in block.reason
        assert found in block.reason
        assert block.kind.endswith("Attention")


def test_heads_that_work_in_pairs() -> None:
    anatomy = find_sites(on_meta("diffllama", **_SMALL, intermediate_size=48))
    assert anatomy.sites == ()
    assert [block.kind for block in anatomy.unreadable] == ["DiffLlamaAttention"] * 2
    assert all("differential attention" in block.reason for block in anatomy.unreadable)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("stablelm", {"qk_layernorm": True, "intermediate_size": 48, "num_key_value_heads": 4}),
        ("cohere", {"use_qk_norm": True, "intermediate_size": 48, "num_key_value_heads": 4}),
    ],
)
def test_a_norm_with_weights_of_each_heads_own(model_type: str, fields: dict[str, Any]) -> None:
    anatomy = find_sites(on_meta(model_type, **_SMALL, **fields))
    assert anatomy.unreadable == ()
    for site in anatomy.sites:
        for norm in (site.q_norm, site.k_norm):
            assert norm is not None
            assert (norm.size, norm.tensors) == (8, ("weight",))
            assert (norm.rows, norm.each) == (
                (model_type == "cohere"),
                "norms"[: 5 * (not norm.rows)],
            )
            assert norm.differs


def test_keys_and_values_in_one_projection_without_the_queries() -> None:
    """GPT-2's cross-attention, beside its self-attention, whose projection has all three."""
    anatomy = find_sites(on_meta("gpt2", **_SMALL, add_cross_attention=True))
    assert [site.path for site in anatomy.sites] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert [block.reason for block in anatomy.unreadable] == [
        "c_attn holds keys and values of another sequence, and no queries"
    ] * 2


def test_a_norm_that_is_made_of_other_parts() -> None:
    model = on_meta("stablelm", **_SMALL, qk_layernorm=True, num_key_value_heads=4)
    del model.model.layers[1].self_attn.k_layernorm.norms[0]
    anatomy = find_sites(model)
    assert [site.path for site in anatomy.sites] == ["model.layers.0.self_attn"]
    assert [block.reason for block in anatomy.unreadable] == [
        "k_layernorm is made of parts that are not one norm for each head"
    ]


@pytest.mark.parametrize("model_type", ["mamba", "xlstm"])
def test_a_model_without_attention(model_type: str) -> None:
    anatomy = find_sites(on_meta(model_type, num_hidden_layers=2))
    assert (anatomy.sites, anatomy.unreadable, anatomy.left_alone) == ((), (), ())


def test_linear_attention_is_left_alone_beside_sites() -> None:
    anatomy = find_sites(family("minimax"))
    assert [site.path for site in anatomy.sites] == ["model.layers.1.self_attn"]
    (block,) = anatomy.left_alone
    assert block.path == "model.layers.0.self_attn"
    assert "linear attention" in block.reason


def test_linear_attention_with_the_names_of_a_site_is_none() -> None:
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    model = on_meta("kimi_linear", num_hidden_layers=4, layer_types=layers)
    anatomy = find_sites(model)
    assert anatomy.sites == ()
    assert [block.path for block in anatomy.left_alone] == [
        f"model.layers.{layer}.self_attn" for layer in range(3)
    ]
    assert [block.path for block in anatomy.unreadable] == ["model.layers.3.self_attn"]


def test_a_vision_tower_is_left_alone_and_the_text_models_layers_are_numbered() -> None:
    text = _SMALL | {"intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8}
    model = on_meta("gemma3", text_config=text, vision_config=_VISION)
    anatomy = find_sites(model)
    assert [(site.layer, site.config_prefix) for site in anatomy.sites] == [
        (0, "text_config."),
        (1, "text_config."),
    ]
    assert len(anatomy.left_alone) == 3  # two layers, one pooling head
    assert all("vision" in block.path for block in anatomy.left_alone)
    assert all("it belongs to vision_config" in block.reason for block in anatomy.left_alone)


def test_containers_of_attention_are_not_counted_beside_it() -> None:
    model = on_meta(
        "mllama",
        text_config=_SMALL
        | {
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    kinds = [type(model.get_submodule(s.path)).__name__ for s in find_sites(model).sites]
    assert kinds == ["MllamaTextSelfAttention", "MllamaTextCrossAttention"]
    assert find_sites(model).unreadable == ()


def test_an_encoder_decoders_blocks_are_all_found() -> None:
    sites = find_sites(
        on_meta(
            "bart",
            AutoModelForSequenceClassification,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
        )
    ).sites
    assert len(sites) == 6  # decoder layers have two
    assert [site.cross for site in sites] == [False, False, False, True, False, True]
