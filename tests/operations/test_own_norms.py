"""Heads that each have norms of their own: a list of norms (StableLM), rows of weights (Cohere)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.errors import ConfigError, PlanError
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

FIELDS: dict[str, dict[str, Any]] = {
    "stablelm": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
}


def built(model_type: str, kv_heads: int | None = None) -> PreTrainedModel:
    return build("causal-lm", model_type, kv_heads=kv_heads, **FIELDS[model_type])


def key_heads(model: PreTrainedModel, layer: int) -> list[list[Tensor]]:
    """For each KV head, everything that is its own, found without the code under test."""
    block = model.model.layers[layer].self_attn
    heads: list[list[Tensor]] = [[] for _ in range(4)]
    for name, tensor in block.named_parameters():
        if name.startswith(("k_proj", "v_proj")):
            for head, rows in zip(heads, tensor.data.split(8), strict=True):
                head.append(rows)
    if hasattr(block, "k_layernorm"):
        for head, norm in zip(heads, block.k_layernorm.norms, strict=True):
            head.append(norm.weight.data)
    else:
        for head, row in zip(heads, block.k_norm.weight.data, strict=True):
            head.append(row)
    return heads


@pytest.mark.parametrize("model_type", FIELDS)
@pytest.mark.parametrize("merge", ["mean", "first"])
def test_norms_of_heads_that_share_merge_as_their_keys_do(model_type: str, merge: str) -> None:
    original = built(model_type)
    before = logits("causal-lm", original)
    for layer in range(2):
        heads = key_heads(original, layer)
        assert {len(head) for head in heads} == {3}
        for tensors in zip(*heads, strict=True):
            for pair in (tensors[:2], tensors[2:]):
                merged = torch.stack(pair).mean(0) if merge == "mean" else pair[0].clone()
                for tensor in pair:
                    tensor.copy_(merged)
    model, plan = operated(built(model_type), gqa={"kv_heads": 2, "merge": merge})
    assert_same(logits("causal-lm", model), logits("causal-lm", original))
    assert_other(logits("causal-lm", model), before)
    assert parameters(model) == plan.sizes_after.parameters
    assert plan.export.format == "native"


@pytest.mark.parametrize("model_type", FIELDS)
def test_as_many_as_there_are_is_the_identity(model_type: str) -> None:
    assert plan_of(built(model_type), {"gqa": {"kv_heads": 4}}).changes == ()


@pytest.mark.parametrize("model_type", FIELDS)
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"merge": "optimal"}, "merge"),
        ({"merge": "aligned"}, "merge"),
        ({"grouping": "similarity"}, "grouping"),
        ({"groups": {0: [[0, 2], [1, 3]]}}, "groups"),
    ],
)
def test_calibration_cannot_use_them(model_type: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match="has other weights for each head") as caught:
        plan_of(built(model_type), {"gqa": {"kv_heads": 2, **options}})
    assert caught.value.key == f"attention.gqa.{key}"


class TestRecord:
    """StableLM has one head width, its hidden size over its heads, so fewer heads need a record."""

    def reloaded(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, attn_implementation="eager").eval()

    def test_norms_are_as_many_as_heads_when_it_is_read(self, tmp_path: Path) -> None:
        model, plan = operated(built("stablelm"), prune_heads={"heads": {0: [1], 1: [0, 3]}})
        assert plan.export.format == "record"
        names = {name for name in model.state_dict() if "layers.1" in name and "norms" in name}
        assert {name.rpartition("norms.")[2] for name in names} == {"0.weight", "1.weight"}
        loaded = self.reloaded(model, tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert stored["format"] == 2
        assert stored["lists"]["model.layers.0.self_attn.q_layernorm.norms"] == 3
        assert torch.equal(logits("causal-lm", loaded), logits("causal-lm", model))
        assert find_sites(loaded).sites == plan.after
        ids = torch.arange(8, 17)[None]
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        found = [
            one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            for one in (loaded, model)
        ]
        assert torch.equal(*found)

    def test_it_can_be_operated_on_again(self, tmp_path: Path) -> None:
        """Pruned, read, repeated in one layer only, read, merged, and read."""
        model, _ = operated(built("stablelm", 2), prune_heads={"heads": [0, 2]})
        first = logits("causal-lm", model)
        model, plan = operated(self.reloaded(model, tmp_path / "one"), gqa={"kv_heads": [2, 1]})
        merged = logits("causal-lm", model)
        assert_other(merged, first)
        model = self.reloaded(model, tmp_path / "two")
        assert torch.equal(logits("causal-lm", model), merged)
        model, plan = operated(model, gqa={"kv_heads": 2})
        assert [site.kv_heads for site in plan.after] == [2, 2]
        loaded = self.reloaded(model, tmp_path / "three")
        assert_same(logits("causal-lm", loaded), merged)
        assert find_sites(loaded).sites == plan.after

    @pytest.mark.parametrize(
        ("lists", "said"),
        [
            ({"model.layers.9.self_attn.q_layernorm.norms": 3}, "does not fit the model"),
            ({"model.layers.0.self_attn": 3}, "no attention block has 3 heads"),
            ({"model.layers.0.self_attn.q_layernorm.norms": 10**9}, "no attention block has"),
            ({"model.layers.0.self_attn.q_layernorm.norms": 0}, "must be at least 1, not 0"),
            (
                {"model.layers.0.self_attn.q_layernorm.norms": "3"},
                "must be a whole number, not '3'",
            ),
        ],
    )
    def test_a_list_that_does_not_fit_is_named(
        self, lists: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        model, _ = operated(built("stablelm"), prune_heads={"heads": [1]})
        model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["lists"] = lists
        path.write_text(json.dumps(config))
        with pytest.raises(PlanError, match=said):
            type(model).from_pretrained(tmp_path)

    def test_a_config_with_other_groups_is_named(self, tmp_path: Path) -> None:
        """The record says nothing of groups, since there were none when it was written."""
        model, _ = operated(built("stablelm"), prune_heads={"heads": [1]})
        model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 2}))
        with pytest.raises(PlanError, match=r"num_key_value_groups: it is 2, but .* are for 1"):
            type(model).from_pretrained(tmp_path)


def test_rows_of_norms_are_native(tmp_path: Path) -> None:
    model, plan = operated(built("cohere"), prune_heads={"heads": {0: [1], 1: [3]}})
    assert plan.export.format == "native"
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits("causal-lm", loaded), logits("causal-lm", model))
    norms = [layer.self_attn.k_norm.weight for layer in loaded.model.layers]
    assert [tuple(weight.shape) for weight in norms] == [(3, 8)] * 2
