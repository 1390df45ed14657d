"""Predicted sizes: by hand on paper, and counted on the operated model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.plan.sizes import count_attention_flops, count_sizes
from tests.families import SEPARATE, family, masked_lm, randomised, tokens
from tests.operations.reference import gqa_plan
from tests.operations.zoo_models import build, plan_of


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes of keys and values after `length` tokens of one sequence."""
    with torch.no_grad():
        cache = model(input_ids=tokens(1, length), use_cache=True).past_key_values
    attention = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept = [t for layer in attention for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in kept)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    layers = draw(st.integers(1, 3))
    subset = st.lists(st.integers(0, layers - 1), min_size=1, max_size=4)
    return {
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "groups": draw(st.sampled_from([n for n in range(1, kv_heads + 1) if not kv_heads % n])),
        "head_dim": 2 * draw(st.integers(1, 6)),
        "num_layers": layers,
        "layers": draw(st.none() | subset),
        "merge": draw(st.sampled_from(["mean", "first", "random"])),
        "model_type": draw(st.sampled_from(["mistral", "qwen3", "olmo2"])),
        "tied": draw(st.booleans()),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_predictions_hold_for_any_counts(case: dict[str, object]) -> None:
    config = AutoConfig.for_model(
        case["model_type"],
        vocab_size=61,
        hidden_size=case["q_heads"] * case["head_dim"],
        intermediate_size=8,
        num_hidden_layers=case["num_layers"],
        num_attention_heads=case["q_heads"],
        num_key_value_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        tie_word_embeddings=case["tied"],
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = randomised(AutoModelForCausalLM.from_config(config), 0, torch.float32)
    plan = gqa_plan(model, case["groups"], layers=case["layers"], merge=case["merge"])
    chosen = range(case["num_layers"]) if case["layers"] is None else case["layers"]
    assert [site.kv_heads for site in plan.after] == [
        case["groups"] if layer in chosen else case["kv_heads"]
        for layer in range(case["num_layers"])
    ]
    assert cache_bytes(model, 5) == 5 * 2 * plan.sizes_before.kv_bytes_per_token
    apply_(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.sizes_after.parameters
    # Plans are made for two bytes per value here; the cache is fp32.
    assert cache_bytes(model, 5) == 5 * 2 * plan.sizes_after.kv_bytes_per_token
    for site in plan.after:
        key = model.get_submodule(site.key.path)
        assert key.weight.shape == (site.kv_heads * site.head_dim, site.key.in_features)
        assert (key.out_features, key.in_features) == (key.weight.shape[0], key.weight.shape[1])


def test_kv_bytes_by_hand() -> None:
    sites = gqa_plan(family("qwen3", num_key_value_heads=4), 1, layers=[1]).after
    sizes = count_sizes(0, sites, tokens=10, bytes_per_value=2)
    # Layer 0: keys and values, 4 heads of 16 values of 2 bytes; layer 1: one head.
    assert sizes.kv_bytes_per_token == 2 * 4 * 16 * 2 + 2 * 1 * 16 * 2
    assert sizes.kv_bytes == 10 * sizes.kv_bytes_per_token


def test_kv_bytes_of_a_window_by_hand() -> None:
    model = family("mistral", sliding_window=4)
    # Two layers, keys and values, 8 heads of 8 values of 2 bytes.
    token = 2 * 2 * 8 * 8 * 2
    for length, kept in ((2, 2), (3, 3), (4, 3), (10, 3)):  # the query's own key comes with it
        sizes = make_plan(model, [], tokens=length).sizes_before
        assert sizes.kv_bytes == kept * token
        assert sizes.kv_bytes_per_token == pytest.approx(kept * token / length)


@pytest.mark.parametrize("length", [3, 4, 5, 12])
def test_the_cache_of_a_window_is_as_predicted(length: int) -> None:
    model = family("mistral", dtype=torch.bfloat16, sliding_window=4)
    plan = make_plan(model, parse_operations({"gqa": {"kv_heads": 2}}), tokens=length)
    assert cache_bytes(model, length) == plan.sizes_before.kv_bytes
    apply_(model, plan)
    assert cache_bytes(model, length) == plan.sizes_after.kv_bytes


def test_attention_flops_by_hand() -> None:
    plan = make_plan(family("llama"), [], tokens=10)
    # Per layer: scores and weighted sum 4 * 10 * 10 * 8 heads * 8, halved by causality, and four
    # projections of 64 * 64 multiply-adds for 10 tokens.
    per_layer = 4 * 10 * 10 * 8 * 8 // 2 + 4 * (2 * 10 * 64 * 64)
    assert plan.sizes_before.attention_flops == 2 * per_layer


def test_attention_flops_of_a_window_by_hand() -> None:
    plan = make_plan(family("mistral", sliding_window=4), [], tokens=10)
    # Half of what 10 tokens have, 10 * 10 / 2, less what lies outside of the window, 6 * 6 / 2.
    per_layer = 4 * 32 * 8 * 8 + 4 * (2 * 10 * 64 * 64)
    assert plan.sizes_before.attention_flops == 2 * per_layer


def test_attention_flops_of_fewer_heads_fall_by_the_projections_alone() -> None:
    plan = gqa_plan(family("llama"), 2)
    saved = 2 * 2 * (2 * plan.tokens * 64 * (64 - 16))  # layers, keys and values
    assert plan.sizes_before.attention_flops - plan.sizes_after.attention_flops == saved


def test_an_encoder_computes_all_scores() -> None:
    sites = make_plan(masked_lm("eurobert"), []).before
    projections = 4 * (2 * 10 * 64 * 64)
    assert count_attention_flops(sites, 10) == 2 * (4 * 10 * 10 * 8 * 8 + projections)


def test_layers_without_keys_cost_no_cache() -> None:
    plan = make_plan(family("minimax"), [], kv_bytes=4)
    assert plan.sizes_before.kv_bytes_per_token == 1 * 2 * 8 * 8 * 4


@pytest.mark.parametrize("name", SEPARATE)
def test_every_familys_cache_grows_as_predicted(name: str) -> None:
    model = family(name, dtype=torch.bfloat16)
    plan = make_plan(model, parse_operations({"gqa": {"kv_heads": 2}}), tokens=5)
    apply_(model, plan)
    assert cache_bytes(model, 5) == plan.sizes_after.kv_bytes


NORMED_TOGETHER = {"olmo2", "olmoe"}


@pytest.mark.parametrize("name", sorted(set(SEPARATE) - NORMED_TOGETHER))
def test_every_familys_sizes_fall_as_predicted_when_heads_go(name: str) -> None:
    model = family(name, dtype=torch.bfloat16, num_key_value_heads=4)
    last = len(find_sites(model).sites) - 1
    heads = {0: [2, 3], last: [0, 1, 6, 7]}
    plan = make_plan(model, parse_operations({"prune_heads": {"heads": heads}}), tokens=5)
    apply_(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.sizes_after.parameters
    assert cache_bytes(model, 5) == plan.sizes_after.kv_bytes
    assert plan.sizes_after.attention_flops < plan.sizes_before.attention_flops


@pytest.mark.parametrize(
    ("kv_heads", "fields", "kept"),
    [
        (2, {"new_decoder_architecture": True, "multi_query": False, "alibi": False}, 4),
        (1, {"new_decoder_architecture": False, "multi_query": True, "alibi": False}, None),
    ],
)
def test_a_cache_that_keeps_more_than_its_kv_heads_is_said(
    kv_heads: int, fields: dict[str, Any], kept: int | None
) -> None:
    """Falcon's newer architecture repeats them before it caches them."""
    model = build("causal-lm", "falcon", kv_heads=kv_heads, **fields)
    plan = plan_of(model, {"prune_heads": {"heads": []}}, kv_bytes=8, tokens=12)
    held = cache_bytes(model, 12)
    notes = [note for note in plan.notes if note.startswith("KV cache: ")]
    assert held == plan.sizes_after.kv_bytes * (1 if kept is None else kept // kv_heads)
    assert len(notes) == (kept is not None)
    assert kept is None or f"itself keeps {kept} heads per layer" in notes[0]
