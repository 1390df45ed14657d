"""How each architecture lays out its heads, as its sites say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.coverage import zoo
from surgery.models.sites import Packing, Site, find_sites
from surgery.transforms.head_edits import list_units
from tests.operations.zoo_models import build

QKV = ("query", "key", "value")


def sites_of(kind: str, model_type: str, **options: Any) -> tuple[Site, ...]:
    anatomy = find_sites(build(kind, model_type, **options))
    assert anatomy.unreadable == ()
    return anatomy.sites


@pytest.mark.parametrize(
    ("model_type", "options", "packing", "kv_heads"),
    [
        ("gpt2", {}, Packing(QKV, 1, grouped=False), 4),
        ("phi3", {}, Packing(QKV, 1, grouped=False), 4),
        ("phi3", {"kv_heads": 2}, Packing(QKV, 1, grouped=False), 2),
        ("mpt", {}, Packing(QKV, 1, grouped=False), 4),
        ("dbrx", {}, Packing(QKV, 1, grouped=False), 4),
        ("gpt_neox", {}, Packing(QKV, 4, grouped=True), 4),
        ("bloom", {}, Packing(QKV, 4, grouped=True), 4),
        ("gpt_bigcode", {"multi_query": False}, Packing(QKV, 4, grouped=True), 4),
        ("gpt_bigcode", {"multi_query": True}, Packing(QKV, 1, grouped=True), 1),
        (
            "falcon",
            {"multi_query": False, "new_decoder_architecture": False},
            Packing(QKV, 4, grouped=True),
            4,
        ),
        (
            "falcon",
            {"multi_query": True, "new_decoder_architecture": False},
            Packing(QKV, 1, grouped=True),
            1,
        ),
        (
            "falcon",
            {"new_decoder_architecture": True, "kv_heads": 2},
            Packing(QKV, 2, grouped=True),
            2,
        ),
        (
            "codegen",
            {"n_head": 8, "n_embd": 64, "rotary_dim": 4},
            Packing(("query", "value", "key"), 4, grouped=False),
            8,
        ),
    ],
)
def test_fused_projections(
    model_type: str, options: dict[str, Any], packing: Packing, kv_heads: int
) -> None:
    model = build("causal-lm", model_type, **options)
    q_heads = model.config.num_attention_heads
    for site in find_sites(model).sites:
        assert site.packing == packing
        assert site.query == site.key == site.value
        assert (site.q_heads, site.kv_heads, site.head_dim) == (q_heads, kv_heads, 8)
        assert len(list_units(packing, q_heads, kv_heads)) * 8 == site.query.out_features
        weight = model.get_submodule(site.query.path).weight
        shape = (site.query.out_features, site.query.in_features)
        assert tuple(weight.shape) == (shape[::-1] if site.query.transposed else shape)


def test_conv1d_is_read_as_transposed() -> None:
    for site in sites_of("causal-lm", "gpt2"):
        assert site.query.transposed
        assert site.output.transposed
    assert not any(s.query.transposed for s in sites_of("causal-lm", "gpt_bigcode"))


@pytest.mark.parametrize(
    ("packing", "q_heads", "kv_heads", "laid"),
    [
        (Packing(QKV, 1, grouped=False), 4, 2, "q0 q1 q2 q3 k0 k1 v0 v1"),
        (Packing(QKV, 2, grouped=True), 4, 2, "q0 q1 k0 v0 q2 q3 k1 v1"),
        (
            Packing(("query", "value", "key"), 2, grouped=False),
            4,
            4,
            "q0 q1 v0 v1 k0 k1 q2 q3 v2 v3 k2 k3",
        ),
    ],
)
def test_the_order_in_a_fused_projection(
    packing: Packing, q_heads: int, kv_heads: int, laid: str
) -> None:
    found = [f"{role[0]}{head}" for role, head in list_units(packing, q_heads, kv_heads)]
    assert " ".join(found) == laid


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm"])
def test_berts_output_projection_lies_beside_the_block(kind: str) -> None:
    sites = sites_of(kind, "bert", **({"is_decoder": True} if kind == "causal-lm" else {}))
    assert [site.path for site in sites] == [
        f"bert.encoder.layer.{layer}.attention.self" for layer in range(2)
    ]
    for site in sites:
        assert site.block == site.path.removesuffix(".self")
        assert site.output.path == f"{site.block}.output.dense"
        assert site.cached == (kind == "causal-lm")


@pytest.mark.parametrize(
    ("model_type", "paths"),
    [
        (
            "bart",
            [
                "encoder.layers.0.self_attn",
                "encoder.layers.1.self_attn",
                "decoder.layers.0.self_attn",
                "decoder.layers.0.encoder_attn",
                "decoder.layers.1.self_attn",
                "decoder.layers.1.encoder_attn",
            ],
        ),
        (
            "t5",
            [
                "encoder.block.0.layer.0.SelfAttention",
                "encoder.block.1.layer.0.SelfAttention",
                "decoder.block.0.layer.0.SelfAttention",
                "decoder.block.0.layer.1.EncDecAttention",
                "decoder.block.1.layer.0.SelfAttention",
                "decoder.block.1.layer.1.EncDecAttention",
            ],
        ),
    ],
)
def test_encoders_decoders_and_what_lies_between(model_type: str, paths: list[str]) -> None:
    sites = sites_of("seq2seq-lm", model_type)
    assert [site.path.removeprefix("model.") for site in sites] == paths
    assert [site.cross for site in sites] == [False, False, False, True, False, True]
    # What is looked at across does not grow while text is written.
    assert [site.cached for site in sites] == [False, False, True, False, True, False]


def test_a_model_of_images_alone_has_sites() -> None:
    for site in sites_of("image-classification", "vit"):
        assert (site.q_heads, site.kv_heads, site.head_dim) == (4, 4, 8)
        assert (site.cached, site.cross, site.config_prefix) == (False, False, "")


def test_gates_beside_the_queries_make_a_query_heads_unit_twice_as_wide() -> None:
    (site,) = sites_of("causal-lm", "qwen3_next")
    assert (site.q_heads, site.head_dim) == (4, 8)
    assert (site.query.unit, site.key.unit, site.value.unit, site.output.unit) == (16, 8, 8, 8)
    assert site.query.out_features == 4 * 16
    assert site.q_norm is not None
    assert site.q_norm.size == 8


def test_linears_with_a_module_around_each_are_named_themselves() -> None:
    model = build("causal-lm", "moshi")
    for site in find_sites(model).sites:
        for role in ("query", "key", "value", "output"):
            path = site.get_projection(role).path
            assert path.endswith("_proj.linear")
            assert isinstance(model.get_submodule(path), torch.nn.Linear)


TYPES = [
    ("causal-lm", "gpt2"),
    ("causal-lm", "phi3"),
    ("causal-lm", "codegen"),
    ("causal-lm", "moshi"),
    ("causal-lm", "qwen3_next"),
    ("masked-lm", "bert"),
    ("seq2seq-lm", "bart"),
    ("seq2seq-lm", "t5"),
    ("image-classification", "vit"),
    ("causal-lm", "falcon"),
]


@pytest.mark.parametrize(("kind", "model_type"), TYPES)
def test_a_site_written_as_json_reads_back_as_itself(kind: str, model_type: str) -> None:
    for site in sites_of(kind, model_type):
        assert Site.from_json(site.to_json()) == site


@pytest.mark.parametrize(("kind", "model_type"), TYPES)
def test_a_sites_parameters_are_those_of_its_modules(kind: str, model_type: str) -> None:
    model: PreTrainedModel = zoo.tiny_model(kind, model_type)
    for site in find_sites(model).sites:
        for role in ("query", "key", "value", "output"):
            projection = site.get_projection(role)
            module = model.get_submodule(projection.path)
            assert projection.parameters == sum(p.numel() for p in module.parameters())
            assert projection.bias == (getattr(module, "bias", None) is not None)


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("deepseek_v2", "DeepseekV2Attention", "no query, key and value projections are recogni"),
        ("deepseek_v3", "DeepseekV3Attention", "found q_a_proj, q_a_layernorm, q_b_proj, kv_a_"),
        ("diffllama", "DiffLlamaAttention", "its heads work in pairs across the two halves"),
    ],
)
def test_what_is_not_understood_is_named_with_its_reason(
    model_type: str, kind: str, reason: str
) -> None:
    anatomy = find_sites(build("causal-lm", model_type))
    assert anatomy.sites == ()
    assert len(anatomy.unreadable) == 2
    for block in anatomy.unreadable:
        assert block.kind == kind
        assert reason in block.reason
