"""`gqa` on other layouts than separate projections, against originals whose groups share their
first head where attention is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.coverage.oracles import first_heads_shared, first_heads_written_
from surgery.models.sites import find_sites
from tests.operations.zoo_models import (
    assert_other,
    assert_same,
    build,
    logits,
    operated,
    parameters,
    plan_of,
)

# Kind, type, what it is built with: six sites in a seq2seq model, two elsewhere.
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("causal-lm", "llama", {}),
    ("causal-lm", "gpt2", {}),
    ("causal-lm", "gpt_oss", {}),
    ("causal-lm", "qwen3", {}),
    ("causal-lm", "stablelm", {"qk_layernorm": True}),
    ("causal-lm", "cohere", {"use_qk_norm": True}),
    ("causal-lm", "bert", {"is_decoder": True}),
    ("masked-lm", "bert", {}),
    ("masked-lm", "roberta", {}),
    ("seq2seq-lm", "bart", {}),
    ("seq2seq-lm", "marian", {}),
    ("seq2seq-lm", "t5", {}),
    ("image-classification", "vit", {}),
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "model_type", "fields"), FAMILIES)
def test_groups_share_their_first_head(
    kind: str, model_type: str, fields: dict[str, Any], attention: str
) -> None:
    """Another count in every layer: 2, 1, 4, 2, …"""
    if (model_type, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("sinks are attended to by eager and flex alone")

    def built() -> Any:
        return build(kind, model_type, attention=attention, **fields)

    original = built()
    sites = find_sites(original).sites
    counts = [(2, 1, 4)[site.layer % 3] for site in sites]
    groups = {site.path: count for site, count in zip(sites, counts, strict=True)}
    before = logits(kind, original)
    with first_heads_shared(original, groups) as calls:
        expected = logits(kind, original)
    unseen = [site for site in sites if not calls[site.path]]
    if unseen:  # these attend in their own way
        first_heads_written_(original, unseen, groups)
        with first_heads_shared(original, groups):
            expected = logits(kind, original)
    model, plan = operated(built(), gqa={"kv_heads": counts, "merge": "first"})
    assert_same(logits(kind, model), expected)
    assert_other(before, expected)
    assert [site.kv_heads for site in plan.after] == counts
    assert parameters(model) == plan.sizes_after.parameters


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_means_of_equal_heads_change_nothing(model_type: str) -> None:
    model = build("causal-lm", model_type)
    sites = find_sites(model).sites
    if model_type == "llama":
        first_heads_written_(model, sites, dict.fromkeys((site.path for site in sites), 2))
    else:  # keys and values after the queries in one Conv1D
        with torch.no_grad():
            for site in sites:
                fused = model.get_submodule(site.query.path)
                for tensor in (fused.weight, fused.bias):
                    heads = tensor[..., 32:].unflatten(-1, (2, 4, 8))
                    heads.copy_(heads[..., ::2, :].repeat_interleave(2, dim=-2))
    before = logits("causal-lm", model)
    operated(model, gqa={"kv_heads": 2})
    assert_same(logits("causal-lm", model), before)


def test_a_list_is_what_its_numbers_are_one_by_one() -> None:
    one, two = build("causal-lm", "llama"), build("causal-lm", "llama")
    operated(one, gqa={"kv_heads": [2, 1]})
    operated(two, gqa={"kv_heads": 2, "layers": [0]})
    operated(two, gqa={"kv_heads": 1, "layers": [1]})
    state = two.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())


def test_a_list_has_its_numbers_in_the_order_of_layers() -> None:
    model = build("causal-lm", "llama")
    plan = plan_of(model, {"gqa": {"kv_heads": [2, 1], "layers": [1, 0]}})
    assert [site.kv_heads for site in plan.after] == [2, 1]


def test_the_same_number_everywhere_is_native_however_it_is_said() -> None:
    model = build("causal-lm", "llama")
    assert plan_of(model, {"gqa": {"kv_heads": [2, 2]}}).export.format == "native"
    assert plan_of(model, {"gqa": {"kv_heads": [2, 4]}}).export.format == "record"
    assert plan_of(model, {"gqa": {"kv_heads": [4, 4]}}).changes == ()
