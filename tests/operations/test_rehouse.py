"""`rehouse` and `absolute_to_rope`: what they ask of a plan, and that it can be done."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from surgery.errors import ConfigError
from surgery.models.convert import TARGETS, convert_model
from surgery.plan.make import make_plan
from surgery.plan.operation import Conversion, Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.families import skeleton
from tests.models.convert.moving import model_of
from tests.operations.drafts import drafted


def parsed(name: str, **options: object) -> Operation:
    (operation,) = parse_operations({name: options})
    return operation


def conversion_of(operation: Operation, source: str = "llama") -> Conversion:
    conversion = operation.choose_conversion(skeleton(model_of(source)))
    assert conversion is not None
    return conversion


def planned(source: str, attention: dict[str, Any]) -> Plan:
    return make_plan(skeleton(model_of(source)), parse_operations(attention))


@pytest.mark.parametrize("into", TARGETS)
def test_every_target_can_be_asked_for(into: str) -> None:
    assert conversion_of(parsed("rehouse", into=into)) == Conversion(into)


@pytest.mark.parametrize(
    ("operation", "source", "result"),
    [
        (("rehouse", {"into": "phi3"}), "llama", "Phi3ForCausalLM"),
        (("rehouse", {"into": "mistral"}), "llama", "MistralForCausalLM"),
        (("absolute_to_rope", {}), "gpt2", "Starcoder2ForCausalLM"),
        (("absolute_to_rope", {"type": "none"}), "opt", "Starcoder2ForCausalLM"),
        (("absolute_to_rope", {"theta": 500}), "gpt_bigcode", "Starcoder2ForCausalLM"),
    ],
)
def test_what_it_asks_for_can_be_done(operation, source, result) -> None:
    name, options = operation
    arguments = asdict(conversion_of(parsed(name, **options), source))
    new = convert_model(skeleton(model_of(source)), **json.loads(json.dumps(arguments)))
    assert type(new).__name__ == result
    plan = planned(source, {name: options})
    assert plan.conversion == arguments
    assert plan.outcomes == (f"into {new.config.model_type}",)


def test_positions_are_said_in_the_config() -> None:
    model = skeleton(model_of("gpt2"))

    def rope(**options: object) -> dict[str, object]:
        conversion = conversion_of(parsed("absolute_to_rope", **options), "gpt2")
        return dict(convert_model(model, **asdict(conversion)).config.rope_parameters)

    assert rope() == {"rope_type": "default", "rope_theta": 10000.0}
    assert rope(theta=500)["rope_theta"] == 500
    assert rope(type="none")["partial_rotary_factor"] == 0


@pytest.mark.parametrize(
    ("name", "options", "source"),
    [("rehouse", {"into": "phi3"}, "llama"), ("absolute_to_rope", {}, "gpt2")],
)
@pytest.mark.parametrize(
    ("other", "others"),
    [
        ("gqa", {"kv_heads": 2}),  # changes tensors
        ("backend", {"implementation": "sdpa"}),  # adds a step
        ("attention_dropout", {"p": 0.1}),  # sets a config key
    ],
)
def test_it_comes_first(name, options, source, other, others) -> None:
    planned(source, {name: options, other: others})
    with pytest.raises(ConfigError, match=f"attention.{name}: must come first") as caught:
        planned(source, {other: others, name: options})
    assert caught.value.valid == f"{name}, {other}"


def test_only_one_comes_first() -> None:
    with pytest.raises(ConfigError, match="rehouse and absolute_to_rope must both come first"):
        planned("gpt2", {"rehouse": {"into": "starcoder2"}, "absolute_to_rope": {}})


def test_a_plan_says_that_positions_are_left_behind() -> None:
    draft = drafted(skeleton(model_of("gpt2")), parsed("absolute_to_rope"))
    assert "removed" in draft.notes[0]
    assert not draft.changes
    assert not draft.steps
    assert not draft.patch


def test_no_such_target() -> None:
    with pytest.raises(ConfigError, match=r"attention\.rehouse\.into(.|\n)*mistral, phi3"):
        conversion_of(parsed("rehouse", into="palace"))


def test_no_such_base() -> None:
    with pytest.raises(ConfigError, match=r"attention\.absolute_to_rope\.theta: must be above 1"):
        parsed("absolute_to_rope", theta=1)
    with pytest.raises(ConfigError, match=r"theta: type none does not use it"):
        conversion_of(parsed("absolute_to_rope", theta=500, type="none"))


def test_the_wrong_operation_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match="absolute_to_rope") as caught:
        planned("gpt2", {"rehouse": {"into": "starcoder2"}})
    assert caught.value.key == "attention.rehouse.into"
    with pytest.raises(ConfigError, match=r"attention\.absolute_to_rope: .*'llama'"):
        planned("llama", {"absolute_to_rope": {}})
