"""`gqa` asked for what a model's sites cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from tests.families import brings_own_attention, family, masked_lm
from tests.operations.reference import gqa_plan

ONE_TO_EIGHT = "1, 2, 4, 8"


@pytest.mark.parametrize("kv_heads", [3, 5, 7])
def test_a_count_that_does_not_divide(kv_heads: int) -> None:
    with pytest.raises(ConfigError, match="does not divide the 8 KV heads") as caught:
        gqa_plan(family("llama"), kv_heads)
    assert (caught.value.key, caught.value.valid) == ("attention.gqa.kv_heads", ONE_TO_EIGHT)
    assert caught.value.given == kv_heads


@pytest.mark.parametrize("kv_heads", [9, 16])
def test_more_than_there_are(kv_heads: int) -> None:
    with pytest.raises(ConfigError, match="more than the 8 query heads") as caught:
        gqa_plan(family("llama"), kv_heads)
    assert (caught.value.key, caught.value.valid) == ("attention.gqa.kv_heads", ONE_TO_EIGHT)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "wanted", "said", "valid"),
    [
        (8, 2, 3, "2 KV heads .* cannot be repeated to as many", "1, 2, 4, 8"),
        (8, 2, 6, "2 KV heads .* cannot be repeated to as many", "1, 2, 4, 8"),
        (12, 2, 8, "2 KV heads .* shared evenly by 12 query heads", "1, 2, 4, 6, 12"),
        (12, 3, 4, "3 KV heads .* cannot be repeated to as many", "1, 3, 6, 12"),
        (12, 3, 9, "3 KV heads .* shared evenly by 12 query heads", "1, 3, 6, 12"),
        (8, 2, 16, "more than the 8 query heads", "1, 2, 4, 8"),
    ],
)
def test_more_that_the_query_heads_cannot_share(
    heads: int, kv_heads: int, wanted: int, said: str, valid: str
) -> None:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads}
    model = family("llama", **sizes, num_key_value_heads=kv_heads)
    with pytest.raises(ConfigError, match=said) as caught:
        gqa_plan(model, wanted)
    assert (caught.value.key, caught.value.valid) == ("attention.gqa.kv_heads", valid)
    assert caught.value.given == wanted


def test_groups_of_heads_that_are_repeated() -> None:
    model = family("llama", num_key_value_heads=2)
    with pytest.raises(ConfigError, match="are repeated, so none of them share one") as caught:
        gqa_plan(model, 4, groups={0: [[0], [1]]})
    assert caught.value.key == "attention.gqa.groups"


@pytest.mark.parametrize("kv_heads", [0, -1, -2])
def test_none_and_fewer(kv_heads: int) -> None:
    with pytest.raises(ConfigError) as caught:
        gqa_plan(family("llama"), kv_heads)
    assert (caught.value.key, caught.value.valid) == ("attention.gqa.kv_heads", ONE_TO_EIGHT)


def test_what_divides_the_query_heads_but_not_the_kv_heads() -> None:
    with pytest.raises(ConfigError, match="does not divide the 6 KV heads"):
        gqa_plan(family("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6), 4)


@pytest.mark.parametrize("layer", [2, 17, -1])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ConfigError, match="there is no such layer") as caught:
        gqa_plan(family("llama"), 2, layers=[0, layer])
    assert (caught.value.key, caught.value.valid) == ("attention.gqa.layers", "0 to 1")
    assert caught.value.given == layer


def test_no_layer_at_all() -> None:
    with pytest.raises(ConfigError, match="must name at least one layer") as caught:
        gqa_plan(family("llama"), 2, layers=[])
    assert caught.value.key == "attention.gqa.layers"


def test_layers_named_twice_are_named_once() -> None:
    model = family("llama")
    assert gqa_plan(model, 2, layers=[1, 1]).changes == gqa_plan(model, 2, layers=[1]).changes


@pytest.mark.parametrize("counts", [[2], [2, 2, 2]])
def test_a_list_of_another_length(counts: list[int]) -> None:
    said = f"has {len(counts)} numbers for 2 layers"
    with pytest.raises(ConfigError, match=said) as caught:
        gqa_plan(family("llama"), counts)
    assert caught.value.key == "attention.gqa.kv_heads"
    assert "one number per layer" in str(caught.value)


def test_a_list_has_a_number_per_chosen_layer() -> None:
    with pytest.raises(ConfigError, match="has 2 numbers for 1 layers"):
        gqa_plan(family("llama"), [2, 4], layers=[1])


def test_each_number_of_a_list_is_held_against_its_own_layer() -> None:
    with pytest.raises(ConfigError, match=r"8 KV heads of model.layers.1.self_attn") as caught:
        gqa_plan(family("llama"), [2, 3])
    assert (caught.value.given, caught.value.valid) == (3, ONE_TO_EIGHT)


def unshared(model_type: str, fields: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    return AutoModelForCausalLM.from_config(config)


def test_a_forward_that_attends_in_its_own_way() -> None:
    with pytest.raises(ConfigError, match="cannot share KV heads between query heads") as caught:
        gqa_plan(unshared("bloom", {}), 2)
    assert caught.value.key == "attention.gqa"


def test_whether_it_can_share_is_read_off_the_code() -> None:
    """GPT-J goes through the attention interface in newer releases of transformers."""
    model = unshared("gptj", {"rotary_dim": 4})
    if brings_own_attention("gptj"):
        with pytest.raises(ConfigError, match="cannot share KV heads between query heads"):
            gqa_plan(model, 4)
        return
    model = apply_(model, gqa_plan(model, 4))  # and checks that it computes what was planned
    assert [site.kv_heads for site in find_sites(model).sites] == [4, 4]


def test_a_packing_that_takes_no_other_shapes() -> None:
    """CodeGen's keys are as wide as its queries, whichever attention it uses."""
    refused = "cannot share KV heads|does not take 8 query and 4 KV heads"
    with pytest.raises(ConfigError, match=refused):
        gqa_plan(unshared("codegen", {"rotary_dim": 4}), 4)


def test_a_forward_that_takes_no_other_shapes() -> None:
    model = unshared("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64})
    with pytest.raises(ConfigError, match="does not take 8 query and 2 KV heads of 8") as caught:
        gqa_plan(model, 2)
    assert caught.value.key == "attention"


def test_an_encoder_that_can_share_is_not_refused() -> None:
    model = masked_lm("eurobert")
    assert [site.kv_heads for site in gqa_plan(model, 2).after] == [2, 2]
    assert gqa_plan(model, 2).sizes_before.kv_bytes_per_token == 0
