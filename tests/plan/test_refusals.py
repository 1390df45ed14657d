"""Whole models that are refused, with the block and the reason named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery.errors import ConfigError
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.families import family, family_config
from tests.operations.reference import gqa_plan


def on_meta(model_type: str, auto: Any = AutoModelForCausalLM, **fields: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "said", "block"),
    [
        ("deepseek_v3", "kv_a_proj", "model.layers.0.self_attn (DeepseekV3Attention)"),
        ("diffllama", "work in pairs", "model.layers.0.self_attn (DiffLlamaAttention)"),
    ],
)
@pytest.mark.parametrize("attention", [{"gqa": {"kv_heads": 1}}, {"prune_heads": {"heads": [0]}}])
def test_attention_that_is_not_understood(
    model_type: str, said: str, block: str, attention: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="none of the attention blocks") as caught:
        make_plan(on_meta(model_type, num_hidden_layers=2), parse_operations(attention))
    assert caught.value.key == "attention"
    assert caught.value.given == block
    assert said in caught.value.problem


def test_no_attention_at_all() -> None:
    with pytest.raises(ConfigError, match="no attention was recognised in MambaForCausalLM"):
        gqa_plan(on_meta("mamba", num_hidden_layers=2), 1)


def test_a_model_that_is_understood_in_part_is_not_operated_on_in_part() -> None:
    model = family("llama", num_hidden_layers=3)
    attention = model.model.layers[1].self_attn
    attention.to_qkv = attention.q_proj
    del attention.q_proj, attention.k_proj, attention.v_proj
    for layers in (None, [0]):
        with pytest.raises(ConfigError, match="1 of 3 of the attention blocks") as caught:
            gqa_plan(model, 2, layers=layers)
        assert caught.value.given == "model.layers.1.self_attn (LlamaAttention)"


def test_what_is_left_alone_is_named_in_the_plan() -> None:
    plan = gqa_plan(family("minimax"), 2)
    assert [site.path for site in plan.after] == ["model.layers.1.self_attn"]
    assert [block.path for block in plan.left_alone] == ["model.layers.0.self_attn"]


def test_no_plan_is_refused_where_nothing_is_asked_for() -> None:
    for model_type in ("deepseek_v3", "mamba"):
        plan = make_plan(on_meta(model_type, num_hidden_layers=1), [])
        assert (plan.before, plan.export.format) == ((), "native")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        # Its dynamic mask has a weight per KV head, which no edit would merge.
        ("doge", r"self_attn.A, .* would be \(2,\), and is planned as \(8,\)"),
        # Its checkpoints hold projections joined, in equal parts.
        ("hrm_text", r"k_proj.weight joined with others, in equal parts"),
    ],
)
def test_an_architecture_whose_own_code_would_build_another_site(
    model_type: str, said: str
) -> None:
    fields = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    model = on_meta(
        model_type,
        **fields,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=61,
    )
    with pytest.raises(ConfigError, match=said) as caught:
        gqa_plan(model, 2)
    assert caught.value.key == "attention"


def test_quantized_weights() -> None:
    config = family_config("llama")
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="quantized weights") as caught:
        gqa_plan(model, 2)
    assert caught.value.given == "awq"


def test_a_model_with_more_blocks_than_its_config_says() -> None:
    model = family("llama", num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    with pytest.raises(
        ConfigError, match=r"layers\.2\.self_attn, but its config does not describe"
    ):
        gqa_plan(model, 2)
