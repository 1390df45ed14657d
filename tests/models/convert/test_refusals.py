"""Whatever is not exact is refused, naming the config field that stands in the way."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from surgery.errors import ConversionError
from surgery.models.convert import TARGETS, convert_config, list_targets, map_tensors
from tests.families import family_config

from .moving import NOPE, ROPE, config_of

REFUSED = [
    ("llama", "mistral", None, {"attention_bias": True}),
    ("llama", "phi3", None, {"attention_bias": True}),
    ("llama", "mistral", None, {"mlp_bias": True}),
    ("llama", "phi3", None, {"mlp_bias": True}),
    ("llama", "phi3", None, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ("mistral", "phi3", None, {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gpt2", "starcoder2", ROPE, {"scale_attn_weights": False}),
    ("gpt2", "starcoder2", ROPE, {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", "starcoder2", NOPE, {"reorder_and_upcast_attn": True}),
    ("gpt2", "starcoder2", NOPE, {"add_cross_attention": True}),
    ("gpt2", "starcoder2", ROPE, {"pad_token_id": 61}),
    ("gpt_bigcode", "starcoder2", ROPE, {"scale_attn_weights": False}),
    ("opt", "starcoder2", ROPE, {"do_layer_norm_before": False}),
    ("opt", "starcoder2", ROPE, {"_remove_final_layer_norm": True}),
    ("opt", "starcoder2", ROPE, {"word_embed_proj_dim": 16}),
    ("opt", "starcoder2", ROPE, {"layer_norm_elementwise_affine": False}),
    ("opt", "starcoder2", ROPE, {"layerdrop": 0.1}),
]


@pytest.mark.parametrize(("name", "into", "positions", "fields"), REFUSED)
def test_a_field_in_the_way_is_named(name, into, positions, fields) -> None:
    config = config_of(name, **fields)
    (field,) = fields
    assert field in list_targets(config, positions)[into]
    for act in (convert_config, map_tensors):
        with pytest.raises(ConversionError, match=field):
            act(config, into, positions)


def test_heads_of_odd_width_cannot_be_rotated() -> None:
    config = config_of("gpt2", n_embd=36, n_head=12)
    assert "num_attention_heads" in list_targets(config, ROPE)["starcoder2"]


def test_other_weights_than_plain_ones_are_refused() -> None:
    config = config_of("llama")
    config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "quantization_config" in list_targets(config)["phi3"]
    config = config_of("llama")
    config.auto_map = {"AutoModelForCausalLM": "somewhere.py"}
    assert "auto_map" in list_targets(config)["mistral"]


def test_targets_of_each_kind() -> None:
    def possible(config, positions=None) -> list[str]:
        return [name for name, why in list_targets(config, positions).items() if not why]

    assert set(TARGETS) == {"mistral", "phi3", "starcoder2"}
    assert possible(config_of("llama")) == ["mistral", "phi3"]
    assert possible(config_of("mistral")) == ["phi3"]
    assert possible(config_of("gpt2")) == []
    assert "learned positions" in list_targets(config_of("gpt2"))["starcoder2"]
    assert possible(config_of("gpt2"), ROPE) == ["starcoder2"]
    assert possible(config_of("opt"), NOPE) == ["starcoder2"]
    for other in ("qwen2", "qwen3", "gemma", "starcoder2", "phi", "cohere"):
        assert possible(family_config(other)) == []
    assert possible(AutoConfig.for_model("gpt_neo"), ROPE) == []


def test_positions_are_for_learned_ones_only() -> None:
    with pytest.raises(ConversionError, match="no learned positions"):
        convert_config(config_of("llama"), "mistral", ROPE)


@pytest.mark.parametrize(
    "positions",
    [
        {},
        {"theta": 0},
        {"theta": True},
        {"nope": False},
        {"theta": 1e4, "nope": True},
        {"theta": "x"},
    ],
)
def test_positions_have_to_say_something(positions) -> None:
    with pytest.raises(ConversionError, match="rotary frequencies"):
        convert_config(config_of("gpt2"), "starcoder2", positions)


def test_an_unknown_target_lists_the_possible_ones() -> None:
    with pytest.raises(ConversionError, match="no model can be converted") as caught:
        convert_config(config_of("llama"), "palace")
    assert (caught.value.given, caught.value.valid) == ("palace", ["mistral", "phi3"])
    with pytest.raises(ConversionError, match="already"):
        convert_config(config_of("mistral"), "mistral")
