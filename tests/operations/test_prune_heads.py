"""What is left after pruning, against the original whose heads are silenced where they are read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.coverage.oracles import heads_silenced
from surgery.errors import ConfigError, PlanError
from surgery.execute.live import apply_
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

# Kind, type, KV heads (of 4 query heads; `None`: as many), config fields.
Family = tuple[str, str, int | None, dict[str, Any]]
FAMILIES: list[Family] = [
    ("causal-lm", "llama", None, {}),
    ("causal-lm", "llama", 2, {"attention_bias": True}),
    ("causal-lm", "qwen2", None, {}),  # biases of queries, keys and values
    ("causal-lm", "qwen3", 2, {}),  # norms per head
    ("causal-lm", "qwen3_next", 2, {}),  # gates beside the queries
    ("causal-lm", "gemma2", 2, {}),
    ("causal-lm", "gpt_oss", None, {}),  # sinks
    ("causal-lm", "gpt_oss", 2, {}),
    ("causal-lm", "stablelm", None, {}),
    ("causal-lm", "stablelm", None, {"qk_layernorm": True}),  # a norm for each head
    ("causal-lm", "stablelm", 2, {"qk_layernorm": True}),
    ("causal-lm", "cohere", None, {"use_qk_norm": True}),  # a row of a norm for each head
    ("causal-lm", "cohere", 2, {"use_qk_norm": True}),
    ("causal-lm", "glm4", 2, {}),
    ("causal-lm", "opt", None, {}),
    ("causal-lm", "gptj", None, {}),
    ("causal-lm", "gpt_neo", None, {}),
    ("causal-lm", "moshi", None, {}),  # Linears with a module around each
    ("causal-lm", "gpt2", None, {}),  # fused, Conv1D
    ("causal-lm", "gpt_bigcode", None, {"multi_query": True}),
    ("causal-lm", "phi3", None, {}),  # fused, contiguous
    ("causal-lm", "phi3", 2, {}),
    ("causal-lm", "dbrx", None, {}),
    ("causal-lm", "gpt_neox", None, {}),  # fused, by head
    ("causal-lm", "persimmon", None, {}),
    ("causal-lm", "bert", None, {"is_decoder": True}),  # output projection beside
    ("masked-lm", "bert", None, {}),
    ("masked-lm", "roberta", None, {}),
    ("masked-lm", "electra", None, {}),
    ("masked-lm", "distilbert", None, {}),
    ("masked-lm", "modernbert", None, {}),
    ("seq2seq-lm", "bart", None, {}),  # cross-attention
    ("seq2seq-lm", "pegasus", None, {}),
    ("seq2seq-lm", "marian", None, {}),
    ("image-classification", "vit", None, {}),
    ("image-classification", "dinov2", None, {}),
    ("image-classification", "beit", None, {}),
]
NAMES = [f"{kind.partition('-')[0]}-{name}-{kv or 4}" for kind, name, kv, _ in FAMILIES]


def built(family: Family) -> PreTrainedModel:
    kind, model_type, kv_heads, fields = family
    return build(kind, model_type, kv_heads=kv_heads, **fields)


def expected(family: Family, heads: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the original, and with its heads silenced."""
    model = built(family)
    sites = find_sites(model).sites
    silenced = {site.path: heads.get(site.layer, []) for site in sites}
    before = logits(family[0], model)
    with heads_silenced(model, sites, silenced):
        return before, logits(family[0], model)


def assert_prunes(family: Family, heads: dict[int, list[int]]) -> None:
    before, silenced = expected(family, heads)
    model, plan = operated(built(family), prune_heads={"heads": heads})
    assert_same(logits(family[0], model), silenced)
    assert_other(before, silenced)
    for site, after in zip(plan.before, plan.after, strict=True):
        assert after.q_heads == site.q_heads - len(heads.get(site.layer, []))
    assert parameters(model) == plan.sizes_after.parameters < plan.sizes_before.parameters
    assert find_sites(model).sites == plan.after


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_whole_groups_of_each_layer_go(family: Family) -> None:
    """Another group in every layer."""
    heads = {}
    for site in find_sites(built(family)).sites:
        first = site.group_size * (site.layer % site.kv_heads)
        heads[site.layer] = list(range(first, first + site.group_size))
        if site.kv_heads == 1:
            heads[site.layer] = [site.layer % site.q_heads]
    assert_prunes(family, heads)


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f[2] == 2 and f[1] != "llama"],
    ids=[n for n in NAMES if n.endswith("2") and "llama" not in n],
)
def test_as_many_query_heads_of_each_group_go(family: Family) -> None:
    """Which of a group's two goes is not the same in each."""
    sites = find_sites(built(family)).sites
    assert_prunes(family, {site.layer: [site.layer % 2, 3 - site.layer % 2] for site in sites})


@pytest.mark.parametrize("new", [True, False])
def test_falcons_groups(new: bool) -> None:
    fields = {"new_decoder_architecture": new, "multi_query": not new, "alibi": False}
    family = ("causal-lm", "falcon", 2 if new else None, fields)
    assert_prunes(family, {0: [0, 1], 1: [2, 3]} if new else {0: [0, 3], 1: [1]})


def test_codegens_equal_blocks() -> None:
    family = ("causal-lm", "codegen", None, {"n_head": 8, "n_embd": 64, "rotary_dim": 4})
    assert_prunes(family, {0: [0, 1, 2, 7], 1: [1, 3, 5, 7]})


def test_layers_that_are_not_chosen_stay() -> None:
    model = build("causal-lm", "llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model, plan = operated(model, prune_heads={"heads": [1, 2], "layers": [1]})
    assert [site.q_heads for site in plan.after] == [4, 2]
    for key, tensor in model.state_dict().items():
        assert ("layers.1.self_attn" in key) == (tensor.shape != before[key].shape)
        if "layers.1.self_attn" not in key:
            assert torch.equal(tensor, before[key])


def test_a_head_named_twice_and_text_for_numbers_of_layers() -> None:
    model = build("causal-lm", "llama")
    one = plan_of(model, {"prune_heads": {"heads": {"0": [2, 2, 1]}}})
    assert one.changes == plan_of(model, {"prune_heads": {"heads": {0: [1, 2]}}}).changes


@pytest.mark.parametrize("heads", [[], {}, {0: []}])
def test_no_head_at_all_changes_nothing(heads: Any) -> None:
    plan = plan_of(build("causal-lm", "llama"), {"prune_heads": {"heads": heads}})
    assert not plan.changes_anything
    assert plan.before == plan.after


def test_pruning_twice_is_pruning_both() -> None:
    once, twice = build("causal-lm", "gpt_oss"), build("causal-lm", "gpt_oss")
    operated(once, prune_heads={"heads": [0, 2]})
    operated(twice, prune_heads={"heads": [0]})
    operated(twice, prune_heads={"heads": [1]})  # which was number 2
    state = twice.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in once.state_dict().items())
    assert torch.equal(logits("causal-lm", once), logits("causal-lm", twice))


class TestRemovedAttention:
    ALL = (0, 1, 2, 3)

    @pytest.mark.parametrize(
        ("kind", "model_type", "layers"),
        [
            ("causal-lm", "llama", [0]),
            ("causal-lm", "gpt2", [1]),  # its output bias stays
            ("causal-lm", "gpt_neox", [0]),
            ("causal-lm", "opt", [0]),
            ("causal-lm", "gpt_oss", [0, 1]),
            ("causal-lm", "phi3", [0]),
            ("causal-lm", "mpt", [0, 1]),
            ("masked-lm", "modernbert", [1]),
            ("masked-lm", "distilbert", [0]),
            ("seq2seq-lm", "bart", [0, 3, 4]),
            ("image-classification", "vit", [0]),
        ],
    )
    def test_it_computes_what_silent_heads_compute(
        self, kind: str, model_type: str, layers: list[int]
    ) -> None:
        family: Family = (kind, model_type, None, {})
        heads = {layer: list(self.ALL) for layer in layers}
        before, silenced = expected(family, heads)
        model, plan = operated(
            built(family), prune_heads={"heads": heads, "remove_attention": True}
        )
        assert_same(logits(kind, model), silenced)
        assert_other(before, silenced)
        assert parameters(model) == plan.sizes_after.parameters
        assert len(plan.after) == len(plan.before) - len(layers)
        assert [step.kind for step in plan.steps] == ["remove_attention"]
        assert plan.export.format == "record"

    def test_some_heads_go_elsewhere_at_once(self) -> None:
        family: Family = ("causal-lm", "qwen3", 2, {})
        heads = {0: list(self.ALL), 1: [0, 1]}
        _, silenced = expected(family, heads)
        model, _ = operated(built(family), prune_heads={"heads": heads, "remove_attention": True})
        assert_same(logits("causal-lm", model), silenced)

    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize("layer", [0, 1])
    def test_it_generates_with_a_cache_what_it_does_without(
        self, model_type: str, layer: int
    ) -> None:
        model, _ = operated(
            build("causal-lm", model_type),
            prune_heads={"heads": {layer: list(self.ALL)}, "remove_attention": True},
        )
        ids = torch.arange(8, 26).view(2, 9)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        mask = torch.ones_like(ids)
        found = [
            model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options)
            for cache in (True, False)
        ]
        assert torch.equal(*found)
        together = torch.tensor([[0, 0, 0, *range(8, 14)], list(range(14, 23))])
        mask[0, :3] = 0
        padded = model.generate(input_ids=together, attention_mask=mask, **options)
        alone = model.generate(input_ids=together[:1, 3:], **options)
        assert torch.equal(padded[0, 9:], alone[0, 6:])

    def test_the_cache_grows_as_planned(self) -> None:
        model, plan = operated(
            build("causal-lm", "llama"),
            prune_heads={"heads": {0: list(self.ALL)}, "remove_attention": True},
        )
        with torch.no_grad():
            cache = model(input_ids=torch.arange(8, 13)[None], use_cache=True).past_key_values
        held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
        assert 2 * held == 5 * plan.sizes_after.kv_bytes_per_token  # plans are made for two bytes
        assert cache.get_seq_length() == 5

    @pytest.mark.parametrize(
        ("kind", "model_type"),
        [("causal-lm", "bloom"), ("seq2seq-lm", "t5")],  # adds the residual; makes all biases
    )
    def test_a_block_that_does_more_than_attend_is_not_removed(
        self, kind: str, model_type: str
    ) -> None:
        model = build(kind, model_type)
        before = logits(kind, model)
        attention = {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}}
        with pytest.raises(PlanError, match=r"0\.\w+ cannot be removed|cannot be run without"):
            apply_(model, plan_of(model, attention))
        assert torch.equal(logits(kind, model), before)
        assert len(find_sites(model).sites) == len(find_sites(build(kind, model_type)).sites)

    def test_an_output_projection_beside_the_block_cannot_go_with_it(self) -> None:
        model = build("masked-lm", "bert")
        before = copy.deepcopy(model)
        attention = {"prune_heads": {"heads": [0, 1, 2, 3], "remove_attention": True}}
        with pytest.raises(ConfigError, match="no output projection of its own") as caught:
            apply_(model, plan_of(model, attention))
        assert caught.value.key == "attention.prune_heads.remove_attention"
        assert torch.equal(logits("masked-lm", model), logits("masked-lm", before))


NONE, ALL = "none of them", "all 4 heads of model.layers.0.self_attn would go"
EXACTLY = "needs exactly one of heads, amount and count"


@pytest.mark.parametrize(
    ("options", "key", "said", "valid"),
    [
        ({}, "", EXACTLY, None),
        ({"heads": [0], "amount": 0.5}, "", EXACTLY, None),
        ({"amount": 0.5, "count": 1}, "", EXACTLY, None),
        ({"amount": 0.5}, "scores", "`amount` needs a score for every head", '{"scores": [['),
        ({"count": 1}, "scores", "`count` needs a score for every head", '{"scores": [['),
        ({"heads": [0], "scores": "x.json"}, "scores", "have no effect where `heads`", "null"),
        ({"heads": [0], "estimator": "random"}, "estimator", "has no effect where `heads`", "null"),
        ({"heads": [0], "scope": "global"}, "scope", "has no effect where `heads`", "layer"),
        ({"heads": [0], "uniform": True}, "uniform", "has no effect where `heads`", "false"),
        ({"heads": [0], "protect": [1]}, "protect", "has no effect where `heads`", "null"),
        ({"heads": [0], "schedule": "gradual"}, "schedule", "has no effect where", "one_shot"),
        ({"count": 1, "estimator": "best"}, "estimator", "no such estimator", "leave_one_out"),
        (
            {"count": 1, "estimator": "random", "scores": "x"},
            "estimator",
            "beside `scores`",
            "null",
        ),
        (
            {"count": 1, "scores": "x", "schedule": "iterative"},
            "estimator",
            "`schedule: iterative` scores heads while it trains",
            "gate_gradient",
        ),
        (
            {"count": 1, "estimator": "random", "schedule": "gradual", "refit": True},
            "refit",
            "takes place before training",
            "false, or schedule: one_shot",
        ),
        (
            {"count": 1, "estimator": "random", "rounds": 0},
            "rounds",
            "must be at least 1",
            "at least 1",
        ),
        (
            {"count": 1, "estimator": "random", "until": 0.0},
            "until",
            "must be in (0, 1]",
            "in (0, 1]",
        ),
        (
            {"count": 1, "estimator": "random", "until": 1.1},
            "until",
            "must be in (0, 1]",
            "in (0, 1]",
        ),
        (
            {"count": 1, "estimator": "random", "uniform": True, "remove_attention": True},
            "uniform",
            "a layer that loses its attention",
            "false, or remove_attention: false",
        ),
        (
            {"count": 1, "estimator": "random", "cut": "queries"},
            "cut",
            "every KV head has one query head",
            "groups",
        ),
        (
            {"count": 1, "estimator": "random", "protect": [4]},
            "protect",
            "has no such head",
            "0 to 3",
        ),
        (
            {"count": 1, "estimator": "random", "protect": {2: [0]}},
            "protect",
            "there is no such layer",
            "0, 1",
        ),
        (
            {"count": 1, "estimator": "random", "protect": 1},
            "protect",
            "must be a list of heads",
            "{layer: [heads]}",
        ),
        (
            {"count": 2, "estimator": "random", "protect": [0, 2, 3]},
            "protect",
            "leaves only 1 heads of model.layers.0.self_attn to remove, but 2 should be removed",
            "fewer",
        ),
        (
            {"amount": 0.5, "estimator": "random", "protect": {1: [0, 1, 2]}, "uniform": True},
            "protect",
            "leaves only 1 heads of model.layers.1.self_attn to remove",
            "fewer protected",
        ),
        (
            {"count": 7, "estimator": "random", "scope": "global", "protect": [1]},
            "count",
            "a layer keeps at least one head",
            "at most 6 heads",
        ),
        (
            {"amount": 1.0, "estimator": "random", "scope": "global", "uniform": True},
            "amount",
            "a layer keeps at least one head",
            "at most 6 heads",
        ),
        ({"amount": 1.5, "scores": "x"}, "amount", "must be in [0, 1]", "in [0, 1]"),
        ({"amount": -0.1, "scores": "x"}, "amount", "must be in [0, 1]", "in [0, 1]"),
        ({"count": -1, "scores": "x"}, "count", "must be at least 0", "at least 0"),
        ({"heads": [4]}, "heads", "self_attn has no such head", "0 to 3"),
        ({"heads": [-1]}, "heads", "self_attn has no such head", "0 to 3"),
        ({"heads": {2: [0]}}, "heads", "there is no such layer", "0, 1"),
        ({"heads": {"one": [0]}}, "heads", "there is no such layer", "0, 1"),
        ({"heads": {0: [0]}, "layers": [1]}, "heads", "there is no such layer", "1"),
        ({"heads": 3}, "heads", "must be a list of heads", "a list of heads for every layer"),
        ({"heads": "all"}, "heads", "must be a list of heads", "{layer: [heads]}"),
        ({"heads": [0.5]}, "heads", "must be a list of heads", "{layer: [heads]}"),
        ({"heads": [True]}, "heads", "must be a list of heads", "{layer: [heads]}"),
        ({"heads": {0: 1}}, "heads", "must be a list of heads", "{layer: [heads]}"),
        ({"heads": {0: None}}, "heads", "must be a list of heads", "{layer: [heads]}"),
        ({"heads": [0, 1, 2, 3]}, "heads", ALL, "at most 3, or attention.prune_heads.remove"),
        ({"heads": [0], "layers": [2]}, "layers", "there is no such layer", "0 to 1"),
        ({"heads": [0], "layers": []}, "layers", "must name at least one layer", "null for all"),
        ({"amount": 0.5, "scores": "no/such"}, "scores", "cannot be read: No such file", None),
    ],
)
def test_what_cannot_be_names_the_key_and_what_would_do(
    options: dict[str, Any], key: str, said: str, valid: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(build("causal-lm", "llama"), {"prune_heads": options})
    assert caught.value.key == f"attention.prune_heads{'.' if key else ''}{key}"
    assert said in caught.value.problem
    if valid is None:
        assert caught.value.valid is None
    else:
        assert valid in str(caught.value.valid)


@pytest.mark.parametrize("heads", [[0], [1], [3]])
def test_groups_of_unequal_size_cannot_share(heads: list[int]) -> None:
    with pytest.raises(ConfigError, match="unequal shares of query heads") as caught:
        plan_of(build("causal-lm", "llama", kv_heads=2), {"prune_heads": {"heads": heads}})
    assert caught.value.key == "attention.prune_heads.heads"
    assert "whole groups of 2" in str(caught.value.valid)


@pytest.mark.parametrize("heads", [[0, 1, 2], [0, 1, 3], [1, 2, 3]])
def test_one_group_left_has_as_many_heads_as_are_left(heads: list[int]) -> None:
    assert_prunes(("causal-lm", "llama", 2, {}), {0: heads})


@pytest.mark.parametrize(
    ("kind", "model_type", "attends"),
    [
        ("causal-lm", "bloom", "h.0.self_attention"),  # slopes of ALiBi, made for all layers
        ("causal-lm", "mpt", "blocks.0.attn"),
        ("seq2seq-lm", "t5", "block.1.layer.0.SelfAttention"),  # biases of all its heads come along
    ],
)
def test_what_reaches_all_heads_from_outside_forbids_fewer(
    kind: str, model_type: str, attends: str
) -> None:
    with pytest.raises(ConfigError, match="does not take 3 query and 3 KV heads of 8") as caught:
        plan_of(build(kind, model_type), {"prune_heads": {"heads": [1]}})
    assert caught.value.key == "attention"
    assert attends in caught.value.problem


def test_heads_that_were_normalised_together_cannot_be_parted() -> None:
    with pytest.raises(ConfigError, match="q_norm is taken over all heads together") as caught:
        plan_of(build("causal-lm", "olmo2"), {"prune_heads": {"heads": [0]}})
    assert caught.value.key == "attention.prune_heads"


def test_equal_blocks_lose_equal_shares() -> None:
    model = build("causal-lm", "codegen", n_head=8, n_embd=64, rotary_dim=4)
    with pytest.raises(ConfigError, match="in 4 equal blocks") as caught:
        plan_of(model, {"prune_heads": {"heads": [0]}})
    assert (caught.value.given, caught.value.valid) == ("7 heads left", "a multiple of 4")
