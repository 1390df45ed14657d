"""How a plan says its result can be saved."""

from __future__ import annotations

import pytest

from surgery.execute.live import apply_
from surgery.models.own_record import is_own_record
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from surgery.plan.runtimes import read_runtimes
from tests.families import SEPARATE, family
from tests.operations.reference import gqa_plan


@pytest.mark.parametrize("name", SEPARATE)
def test_one_count_for_all_layers_is_native(name: str) -> None:
    plan = gqa_plan(family(name), 2)
    assert plan.export.format == "native"
    assert plan.export.runtimes[0] == "transformers"
    named = {*plan.export.runtimes, *plan.export.without}
    assert named == {"transformers", *read_runtimes()}
    assert plan.export.reason == "the architecture's own config says the result"
    assert dict(plan.head_patch) == {"num_key_value_heads": 2}
    assert dict(plan.config_patch) == {}


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_chosen_layers_are_not_and_the_counts_are_named(name: str) -> None:
    plan = gqa_plan(family(name), 2, layers=[1])
    assert plan.export.format == "record"
    assert "the result has 2, 8;" in plan.export.reason
    assert plan.export.runtimes == ("transformers",)
    assert set(plan.export.without) == set(read_runtimes())
    assert all("import surgery" in why for why in plan.export.without.values())
    assert dict(plan.head_patch) == dict(plan.config_patch) == {}


def test_all_layers_named_one_by_one_are_native() -> None:
    assert gqa_plan(family("llama"), 2, layers=[0, 1]).export.format == "native"


def test_the_second_half_of_the_layers_makes_it_native_again() -> None:
    model = family("llama")
    apply_(model, gqa_plan(model, 2, layers=[0]))
    assert make_plan(model, []).export.format == "record"
    assert is_own_record(model.config.quantization_config)
    plan = gqa_plan(model, 2, layers=[1])
    assert plan.export.format == "native"
    apply_(model, plan)
    assert model.config.num_key_value_heads == 2
    assert not hasattr(model.config, "quantization_config")  # nothing is left for it to say
    assert make_plan(model, []).export.format == "native"


def test_a_result_that_differs_from_its_config_elsewhere_is_not_native() -> None:
    model = family("llama")
    model.config.vocab_size += 1  # as if the embeddings had been cut without telling the config
    plan = gqa_plan(model, 2)
    assert plan.export.format == "record"
    assert "embed_tokens.weight" in plan.export.reason


def pruned(name: str, heads: object, **fields: object) -> Plan:
    operations = parse_operations({"prune_heads": {"heads": heads}})
    return make_plan(family(name, **fields), operations)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", [0, 2, 5, 7]),
        ("gemma2", [0, 1, 2, 3]),
        ("qwen3", [2]),
        ("seed_oss", [2, 3]),
        ("phi", [2]),
    ],
)
def test_as_many_heads_less_everywhere_are_native(name: str, heads: list[int]) -> None:
    plan, left = pruned(name, heads), 8 - len(heads)
    assert plan.export.format == "native"
    assert plan.head_patch["num_attention_heads"] == left
    assert plan.head_patch["num_key_value_heads"] == left
    assert plan.head_patch["head_dim"] == plan.before[0].head_dim


def test_what_takes_hidden_size_over_heads_for_head_dim_does_not_serve_pruned_heads() -> None:
    assert "vllm" in gqa_plan(family("qwen2"), 2).export.runtimes
    plan = pruned("qwen2", [2])
    assert plan.export.format == "native"
    assert "uses hidden_size / heads as head_dim" in plan.export.without["vllm"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_unequal_query_heads_are_recorded(name: str) -> None:
    plan = pruned(name, {1: [2]})
    assert plan.export.format == "record"
    assert "for all layers; the result has 7, 8;" in plan.export.reason
    assert dict(plan.head_patch) == dict(plan.config_patch) == {}


@pytest.mark.parametrize("name", ["llama", "gemma2", "stablelm"])
def test_a_config_that_does_not_take_the_counts_is_named(name: str) -> None:
    plan = pruned(name, [2])  # of 64 or 32 features, 7 heads are no whole part
    assert plan.export.format == "record"
    assert f"{name} does not accept num_attention_heads=7" in plan.export.reason


def test_what_was_done_before_and_stands_in_the_record_stays_recorded() -> None:
    model = family("llama")
    operations = parse_operations(
        {"prune_heads": {"heads": {0: list(range(8))}, "remove_attention": True}}
    )
    apply_(model, make_plan(model, operations))
    assert make_plan(model, []).export.format == "record"
    plan = gqa_plan(model, 2)
    assert plan.export.format == "record"
    apply_(model, plan)
    assert is_own_record(model.config.quantization_config)
