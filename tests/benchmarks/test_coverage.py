"""The coverage page is what its figures say, and a sample of it comes out the same here."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import transformers

from benchmarks.coverage import zoo
from benchmarks.coverage.attention_kinds import OTHER_ATTENTION
from benchmarks.coverage.caching import cache_bytes
from benchmarks.coverage.check import (
    REFUSED,
    STRUCTURAL,
    WORKS,
    WRONG,
    check,
    check_variant,
)
from benchmarks.coverage.page import FIGURES, PAGE, page
from benchmarks.coverage.variants import format_variant, list_variants
from surgery.models.sites import find_sites
from surgery.plan.sizes import count_kv_bytes

KEPT = json.loads(FIGURES.read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_figures() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(KEPT)


def test_no_type_is_left_out() -> None:
    """Types of another release are tried here, so that nothing goes wrong with them."""
    same = transformers.__version__ == KEPT["transformers"]
    for kind, types in KEPT["types"].items():
        installed = zoo.model_types(kind)
        if same:
            assert sorted(types) == installed
        for name in sorted(set(installed) - set(types)):
            statuses = {outcome.status for outcome in check(kind, name).values()}
            assert WRONG not in statuses, name


def test_nothing_is_wrong() -> None:
    for types in KEPT["types"].values():
        for name, outcomes in types.items():
            assert "unbuildable" in outcomes or sorted(outcomes) == sorted(KEPT["operations"])
            found = {o["status"] for o in outcomes.values() if isinstance(o, dict)}
            assert WRONG not in found, name


@pytest.mark.parametrize("operation", ["gqa", "prune_heads"])
def test_ordinary_attention_is_covered(operation: str) -> None:
    causal = KEPT["types"]["causal-lm"]
    counts = Counter(
        outcomes[operation]["status"]
        for name, outcomes in causal.items()
        if operation in outcomes and name not in OTHER_ATTENTION
    )
    assert counts[WORKS] >= 110


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("causal-lm", "llama"),
        ("causal-lm", "olmo2"),
        ("causal-lm", "gemma2"),
        ("causal-lm", "bloom"),
        ("causal-lm", "deepseek_v3"),
        ("masked-lm", "bert"),
        ("seq2seq-lm", "t5"),
    ],
)
def test_a_sample_comes_out_as_it_is_kept(kind: str, model_type: str) -> None:
    kept = KEPT["types"][kind][model_type]
    for operation, outcome in check(kind, model_type).items():
        assert outcome.status == kept[operation]["status"], (operation, outcome.reason)
        assert outcome.status in (WORKS, REFUSED)
        assert outcome.export == kept[operation].get("export", "")


def test_other_configs_are_those_that_change_attention_and_none_is_wrong() -> None:
    kept = KEPT["variants"]["causal-lm"]
    for model_type in ("cohere", "stablelm"):
        names = [format_variant(model_type, f) for f in list_variants("causal-lm", model_type)]
        assert names == [name for name in kept if name.partition(" ")[0] == model_type]
    assert {"cohere use_qk_norm=true", "stablelm qk_layernorm=true"} <= set(kept)
    for variants in KEPT["variants"].values():
        for name, outcomes in variants.items():
            assert sorted(outcomes) == sorted(STRUCTURAL)
            assert WRONG not in {outcome["status"] for outcome in outcomes.values()}, name


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("stablelm", {"qk_layernorm": True}), ("falcon", {"new_decoder_architecture": True})],
)
def test_a_sample_of_other_configs_comes_out_as_it_is_kept(
    model_type: str, fields: dict[str, bool]
) -> None:
    kept = KEPT["variants"]["causal-lm"][format_variant(model_type, fields)]
    found = check_variant("causal-lm", model_type, fields)
    assert found.keys() == kept.keys()  # none, if the model did not run
    for operation, outcome in found.items():
        assert outcome.status == kept[operation]["status"], (operation, outcome.reason)
        assert outcome.export == kept[operation].get("export", "")


@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        ("llama", {None}),
        ("musicgen", {None}),  # a row of tokens per codebook
        ("gemma2", {8, None}),
        ("mistral", {8}),
        ("modernbert-decoder", {4, None}),
    ],
)
def test_sliding_windows_are_short_and_counted(model_type: str, windows: set[int | None]) -> None:
    """The check of cache sizes asks this of each type first, and passes over those that differ."""
    model = zoo.tiny_model("causal-lm", model_type)
    sites = find_sites(model).sites
    assert {site.window for site in sites if site.cached} == windows
    held = cache_bytes(model, zoo.inputs("causal-lm", model))
    assert held == count_kv_bytes(sites, zoo.LENGTH, model.dtype.itemsize)
