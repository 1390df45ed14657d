"""What a plan says, held against the models before and after it."""

from __future__ import annotations

import pytest

from surgery.execute.live import apply_
from surgery.plan.make import make_plan
from tests.families import SEPARATE, family, skeleton
from tests.operations.reference import gqa_plan


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("options", [{}, {"layers": [0], "merge": "random"}])
def test_weights_make_no_difference_to_a_plan(name: str, options: dict[str, object]) -> None:
    model = family(name)
    assert gqa_plan(skeleton(model), 2, **options) == gqa_plan(model, 2, **options)


@pytest.mark.parametrize("name", SEPARATE)
def test_the_result_has_the_tensors_the_plan_names(name: str) -> None:
    model = family(name)
    plan = gqa_plan(model, 2)
    before = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for edit in plan.edits:
        for spec in edit.sources:
            assert before[spec.name] == spec.shape
    expected = before | {spec.name: spec.shape for edit in plan.edits for spec in edit.results}
    apply_(model, plan)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert plan.sizes_after.parameters == sum(p.numel() for p in model.parameters())


def test_making_a_plan_changes_nothing() -> None:
    model = family("qwen2")
    config = model.config.to_dict()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    gqa_plan(model, 2)
    assert model.config.to_dict() == config
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_shared_embeddings_count_once() -> None:
    tied, untied = family("llama", tie_word_embeddings=True), family("llama")
    embedding = tied.get_input_embeddings().weight.numel()
    for live in (tied, skeleton(tied)):
        assert make_plan(live, []).sizes_before.parameters == (
            make_plan(untied, []).sizes_before.parameters - embedding
        )


def test_no_operation_is_a_plan_that_changes_nothing() -> None:
    plan = make_plan(family("llama"), [], name="it", tokens=7, kv_bytes=4)
    assert (plan.changes, plan.operations, dict(plan.config_patch)) == ((), (), {})
    assert plan.before == plan.after
    assert plan.sizes_before == plan.sizes_after
    assert (plan.model["name"], plan.tokens, plan.kv_bytes) == ("it", 7, 4)


def test_the_seed_reaches_what_is_drawn_and_nothing_else() -> None:
    model = family("llama")
    drawn = [gqa_plan(model, 2, seed=seed, merge="random") for seed in (1, 2)]
    assert drawn[0].edits != drawn[1].edits
    assert gqa_plan(model, 2, seed=1) == gqa_plan(model, 2, seed=2)
