"""`rehouse` and `absolute_to_rope`: what they ask of a plan, and that it can be done."""

from __future__ import annotations

import json

import pytest

from surgery.errors import ConfigError
from surgery.models.convert import TARGETS, convert_model
from surgery.models.sites import find_sites
from surgery.operations.rehouse import HOUSES
from surgery.plan.operation import Draft, Operation, PlanContext, Step
from surgery.plan.registry import parse_operations
from tests.families import skeleton
from tests.rehouse.moving import model_of


def parsed(name: str, **options: object) -> Operation:
    (operation,) = parse_operations({name: options})
    return operation


def draft_of(name: str = "llama") -> Draft:
    model = skeleton(model_of(name))
    return Draft(list(find_sites(model).sites), model.config, model, PlanContext(0, 0.02))


def test_the_houses_are_those_that_exist() -> None:
    assert set(HOUSES) == set(TARGETS)


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
    model = skeleton(model_of(source))
    arguments = parsed(name, **options).rehousing(model.config)
    assert arguments is not None
    new = convert_model(model, **json.loads(json.dumps(arguments)))
    assert type(new).__name__ == result


def test_positions_are_said_in_the_config() -> None:
    model = skeleton(model_of("gpt2"))

    def rope(**options: object) -> dict[str, object]:
        arguments = parsed("absolute_to_rope", **options).rehousing(model.config)
        assert arguments is not None
        return dict(convert_model(model, **arguments).config.rope_parameters)

    assert rope() == {"rope_type": "default", "rope_theta": 10000.0}
    assert rope(theta=500)["rope_theta"] == 500
    assert rope(type="none")["partial_rotary_factor"] == 0


@pytest.mark.parametrize(
    ("name", "options"), [("rehouse", {"into": "phi3"}), ("absolute_to_rope", {})]
)
def test_it_comes_first(name, options) -> None:
    operation = parsed(name, **options)
    operation.plan(draft_of())
    for spoil in (
        lambda draft: draft.steps.append(Step("x", "x")),
        lambda draft: draft.set_config("use_cache", False),
    ):
        draft = draft_of()
        spoil(draft)
        with pytest.raises(ConfigError, match=f"attention.{name}: has to come first"):
            operation.plan(draft)


def test_a_plan_says_that_positions_are_left_behind() -> None:
    draft = draft_of("gpt2")
    parsed("absolute_to_rope").plan(draft)
    assert "left behind" in draft.notes[0]
    assert not draft.changes
    assert not draft.steps


def test_no_such_house() -> None:
    with pytest.raises(ConfigError, match=r"attention\.rehouse\.into(.|\n)*mistral, phi3"):
        parsed("rehouse", into="palace").rehousing(None)


def test_no_such_base() -> None:
    with pytest.raises(ConfigError, match=r"attention\.absolute_to_rope\.theta"):
        parsed("absolute_to_rope", theta=1).rehousing(None)


def test_the_wrong_operation_names_the_right_one() -> None:
    arguments = parsed("rehouse", into="starcoder2").rehousing(None)
    assert arguments is not None
    with pytest.raises(ConfigError, match="absolute_to_rope"):
        convert_model(skeleton(model_of("gpt2")), **arguments)
    arguments = parsed("absolute_to_rope").rehousing(None)
    assert arguments is not None
    with pytest.raises(ConfigError, match=r"attention\.absolute_to_rope: .*'llama'"):
        convert_model(skeleton(model_of("llama")), **arguments)
