"""How a plan says its result can be saved."""

from __future__ import annotations

import pytest

from surgery.execute.live import apply_
from surgery.plan.make import make_plan
from tests.families import SEPARATE, family
from tests.operations.reference import gqa_plan


@pytest.mark.parametrize("name", SEPARATE)
def test_one_count_for_all_layers_is_native(name: str) -> None:
    plan = gqa_plan(family(name), 2)
    assert plan.export.format == "native"
    assert plan.export.runtimes == ("transformers",)
    assert dict(plan.config_patch) == {"num_key_value_heads": 2}


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_chosen_layers_are_not_and_the_counts_are_named(name: str) -> None:
    plan = gqa_plan(family(name), 2, layers=[1])
    assert plan.export.format == "none"
    assert plan.export.reason.endswith("the result has 2, 8")
    assert dict(plan.config_patch) == {}


def test_all_layers_named_one_by_one_are_native() -> None:
    assert gqa_plan(family("llama"), 2, layers=[0, 1]).export.format == "native"


def test_the_second_half_of_the_layers_makes_it_native_again() -> None:
    model = family("llama")
    apply_(model, gqa_plan(model, 2, layers=[0]))
    assert make_plan(model, []).export.format == "none"
    plan = gqa_plan(model, 2, layers=[1])
    assert plan.export.format == "native"
    apply_(model, plan)
    assert model.config.num_key_value_heads == 2
    assert make_plan(model, []).export.format == "native"


def test_a_result_that_differs_from_its_config_elsewhere_is_not_native() -> None:
    model = family("llama")
    model.config.vocab_size += 1  # as if the embeddings had been cut without telling the config
    plan = gqa_plan(model, 2)
    assert plan.export.format == "none"
    assert "embed_tokens.weight" in plan.export.reason
