"""KV heads repeated, up to one for each query head: the model computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.coverage.caching import cache_bytes, cached_difference
from surgery.calibration import make_calibrated_plan
from surgery.models.sites import find_sites
from surgery.plan.registry import parse_operations
from tests.operations.zoo_models import assert_same, build, logits, operated, parameters, plan_of

# Type, KV heads (of 4 query heads), config fields.
FAMILIES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 2, {"attention_bias": True}),
    ("llama", 1, {}),
    ("qwen3", 2, {}),  # norms per head
    ("qwen3_next", 2, {}),  # gates beside the queries
    ("gpt_oss", 2, {}),  # sinks
    ("olmo2", 2, {}),  # a norm over all heads
    ("phi3", 2, {}),  # fused, contiguous
    ("dbrx", 2, {}),
    ("gpt_bigcode", 1, {"multi_query": True}),  # fused: one KV head, or each beside its query
    ("falcon", 2, {"new_decoder_architecture": True, "multi_query": False, "alibi": False}),
    ("falcon", 1, {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
]
NAMES = [f"{name}-{kv}" for name, kv, _ in FAMILIES]


def built(model_type: str, kv_heads: int, fields: dict[str, Any]) -> PreTrainedModel:
    return build("causal-lm", model_type, kv_heads=kv_heads, **fields)


@pytest.mark.parametrize(("model_type", "kv_heads", "fields"), FAMILIES, ids=NAMES)
def test_one_for_each_query_head_computes_the_same(
    model_type: str, kv_heads: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    before = logits("causal-lm", built(model_type, kv_heads, fields))
    model, plan = operated(built(model_type, kv_heads, fields), gqa={"kv_heads": 4})
    assert {site.kv_heads for site in plan.after} == {4}
    assert plan.notes == ()
    assert_same(logits("causal-lm", model), before)
    assert parameters(model) == plan.sizes_after.parameters > plan.sizes_before.parameters
    assert plan.sizes_after.kv_bytes * kv_heads == plan.sizes_before.kv_bytes * 4
    native = model_type != "dbrx"  # whose counts are in a part of its config
    assert plan.export.format == ("native" if native else "record")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert native == ("quantization_config" not in config)
    if native and "num_key_value_heads" in config:
        assert config["num_key_value_heads"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    assert_same(logits("causal-lm", loaded), logits("causal-lm", model))
    if model_type not in ("dbrx", "gpt_oss", "qwen3_next"):  # experts add up in no fixed order
        assert torch.equal(logits("causal-lm", loaded), logits("causal-lm", model))
    assert find_sites(loaded).sites == plan.after


def test_its_cache_is_as_large_as_planned() -> None:
    model, _ = operated(built("llama", 1, {}), gqa={"kv_heads": 2})
    given = {"input_ids": torch.arange(8, 20)[None]}
    plan = plan_of(model, {"gqa": {"kv_heads": 4}}, kv_bytes=8, tokens=12)
    assert cache_bytes(model, given) == plan.sizes_before.kv_bytes
    model, plan = operated(model, gqa={"kv_heads": 4})
    assert cached_difference(model, given) < 1e-9
    assert cache_bytes(model, given) == 4 * 12 * plan.sizes_after.kv_bytes_per_token


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_of_their_own(attention: str) -> None:
    """One is repeated, and one merged."""
    one = build("causal-lm", "llama", kv_heads=2, attention=attention)
    two = build("causal-lm", "llama", kv_heads=2, attention=attention)
    one, plan = operated(one, gqa={"kv_heads": [4, 1], "merge": "first"})
    two, _ = operated(two, gqa={"kv_heads": 1, "merge": "first", "layers": [1]})
    assert [site.kv_heads for site in plan.after] == [4, 1]
    assert_same(logits("causal-lm", one), logits("causal-lm", two))
    assert plan.notes == ("gqa: merge=first: no effect in layers 0, whose KV heads are repeated",)


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_what_was_merged_is_given_to_each_again(model_type: str, tmp_path: Path) -> None:
    """Both from a record: their configs have no key for KV heads."""
    fields = {"is_decoder": True} if model_type == "bert" else {}
    model, _ = operated(build("causal-lm", model_type, **fields), gqa={"kv_heads": 1})
    before = logits("causal-lm", model)
    model, plan = operated(model, gqa={"kv_heads": 2})
    assert_same(logits("causal-lm", model), before)
    model.save_pretrained(tmp_path / "two")
    model, plan = operated(model, gqa={"kv_heads": 4})
    assert [site.kv_heads for site in plan.after] == [4, 4]
    for name, wanted in (("two", 2), ("four", 4)):
        if name == "four":
            model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name, attn_implementation="eager").eval()
        assert_same(logits("causal-lm", loaded), before)
        assert {site.kv_heads for site in find_sites(loaded).sites} == {wanted}


def test_calibration_has_nothing_to_decide_where_heads_are_repeated() -> None:
    model = build("causal-lm", "llama", kv_heads=2, dtype=torch.float32)
    batches = [{"input_ids": torch.arange(8, 40).view(2, 16)}]
    options = {"kv_heads": [4, 2], "merge": "optimal", "grouping": "similarity"}
    plan = make_calibrated_plan(model, parse_operations({"gqa": options}), batches)
    assert plan.open_decisions == ()
    assert not plan.tensors
    assert [site.kv_heads for site in plan.after] == [4, 2]
    assert plan.changes == plan_of(model, {"gqa": {"kv_heads": [4, 2]}}).changes
    assert "merge=optimal and grouping=similarity: no effect in layers 0" in plan.notes[0]


def test_rows_are_the_source_rows_to_the_bit() -> None:
    source = built("llama", 2, {"attention_bias": True})
    model, _ = operated(built("llama", 2, {"attention_bias": True}), gqa={"kv_heads": 4})
    for name, tensor in model.state_dict().items():
        old = source.state_dict()[name]
        if "k_proj" in name or "v_proj" in name:
            old = torch.stack([old[:8], old[:8], old[8:], old[8:]]).flatten(0, 1)
        assert torch.equal(tensor, old)
