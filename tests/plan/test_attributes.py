"""What modules hold besides tensors is asked of the architecture, never listed by family."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.errors import ConfigError
from surgery.execute.live import apply_
from tests.families import SEPARATE, family, family_config
from tests.operations.reference import gqa_plan

_PLAIN = (int, float, str, bool, tuple, list, type(None))


def plain(module: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name != "training"
    }


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_an_operated_model_holds_what_one_built_so_holds(name: str, kv_heads: int) -> None:
    model = family(name)
    apply_(model, gqa_plan(model, kv_heads))
    assert plain(model) == plain(family(name, num_key_value_heads=kv_heads))


@pytest.mark.parametrize("name", ["llama", "stablelm", "exaone4"])
def test_layers_that_were_not_chosen_keep_theirs(name: str) -> None:
    model = family(name)
    before = plain(model.model.layers[0])
    apply_(model, gqa_plan(model, 2, layers=[1]))
    assert plain(model.model.layers[0]) == before
    built = family(name, num_key_value_heads=2)
    assert plain(model.model.layers[1]) == plain(built.model.layers[1])


def test_they_are_part_of_the_plan() -> None:
    plan = gqa_plan(family("stablelm"), 2, layers=[1])
    path = "model.layers.1.self_attn"
    assert plan.attributes == {}  # no operation set one
    assert plan.head_attributes == {
        path: {"num_key_value_heads": 2, "num_key_value_groups": 4},
        f"{path}.k_proj": {"out_features": 16},
        f"{path}.v_proj": {"out_features": 16},
    }


class CountingLlama(LlamaForCausalLM):
    """Holds a count outside of its attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.kv_width = config.num_key_value_heads * config.head_dim


def test_a_count_held_outside_of_attention_is_found() -> None:
    model = CountingLlama(family_config("llama"))
    plan = gqa_plan(model, 2)
    assert plan.head_attributes[""] == {"kv_width": 16}
    apply_(model, plan)
    assert model.kv_width == 16


def test_a_count_held_for_all_layers_cannot_differ_between_them() -> None:
    with pytest.raises(ConfigError, match="CountingLlama holds kv_width for several") as caught:
        gqa_plan(CountingLlama(family_config("llama")), 2, layers=[1])
    assert caught.value.key == "attention"
