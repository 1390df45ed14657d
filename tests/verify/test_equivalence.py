"""The equivalence check finds forwards that do not share heads as `repeat_kv` does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention

from surgery.errors import PlanError
from surgery.execute.live import apply_
from surgery.verify.equivalence import check_equivalence
from tests.execute.test_live import assert_untouched
from tests.families import SEPARATE, family, logits
from tests.operations.reference import gqa_plan


class TiledAttention(LlamaAttention):
    """Query head h uses KV head h % kv_heads, as no architecture of transformers does."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kv_heads = self.k_proj.out_features // self.head_dim
        groups = self.q_proj.out_features // self.k_proj.out_features
        order = torch.arange(kv_heads * groups).view(groups, kv_heads).T.reshape(-1)
        rows = (order[:, None] * self.head_dim + torch.arange(self.head_dim)).reshape(-1)
        tiled = copy.copy(self)
        tiled._modules = dict(self._modules)
        tiled.q_proj = nn.Linear(self.q_proj.in_features, len(rows), bias=False)
        tiled.q_proj.weight = nn.Parameter(self.q_proj.weight[rows])
        tiled.o_proj = nn.Linear(len(rows), self.o_proj.out_features, bias=False)
        tiled.o_proj.weight = nn.Parameter(self.o_proj.weight[:, rows])
        return LlamaAttention.forward(tiled, hidden_states, *args, **kwargs)


class StaleAttention(LlamaAttention):
    """Holds its head count where nobody looks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = [self.config.num_key_value_heads]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.k_proj(hidden_states).view(*hidden_states.shape[:2], self._heads[0], self.head_dim)
        return super().forward(hidden_states, *args, **kwargs)


def llama_with(kind: type[LlamaAttention], layer: int = 1) -> PreTrainedModel:
    model = family("llama")
    old = model.model.layers[layer].self_attn
    new = kind(model.config, layer).double().eval()
    new.load_state_dict(old.state_dict())
    model.model.layers[layer].self_attn = new
    return model


def assert_refused(model: PreTrainedModel, said: str) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(PlanError, match=said):
        apply_(model, gqa_plan(model, 2))
    assert_untouched(model, before)


def test_heads_paired_in_another_way() -> None:
    model = llama_with(TiledAttention)
    assert torch.equal(logits(model), logits(family("llama")))  # one KV head each: no difference
    assert_refused(model, "layers.1.self_attn does not use its heads as planned")


def test_a_count_that_nobody_updated() -> None:
    assert_refused(
        llama_with(StaleAttention), "layers.1.self_attn with its new heads cannot be run"
    )


def test_a_block_that_is_never_run() -> None:
    model = family("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(PlanError, match=r"layers.1.self_attn took no part in a forward pass"):
        check_equivalence(model, gqa_plan(model, 2))


def test_a_model_that_cannot_be_run_at_all() -> None:
    model = family("llama")
    model.model.norm.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(PlanError, match="the model cannot be run"):
        check_equivalence(model, gqa_plan(model, 2))


def test_a_model_whose_numbers_are_not_finite() -> None:
    model = family("llama")
    nn.init.constant_(model.model.layers[0].self_attn.v_proj.weight, float("nan"))
    with pytest.raises(PlanError, match="off by nan"):
        check_equivalence(model, gqa_plan(model, 2))


def test_unchecked_is_unchecked() -> None:
    model = llama_with(TiledAttention)
    apply_(model, gqa_plan(model, 2), check=False)
    assert model.model.layers[1].self_attn.k_proj.out_features == 16


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes_and_nothing_changes(name: str, dtype: torch.dtype) -> None:
    model = family(name, dtype=dtype)
    before = copy.deepcopy(model)
    check_equivalence(model, gqa_plan(model, 2))
    assert_untouched(model, before)


@pytest.mark.parametrize("merge", ["first", "random"])
def test_every_merge_passes(merge: str) -> None:
    model = family("olmo2")
    check_equivalence(model, gqa_plan(model, 1, merge=merge))


def test_a_flash_kernel_is_not_asked_of_a_cpu() -> None:
    def only_on_a_gpu(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not query.is_cuda:
            raise RuntimeError("no kernel for CPU")
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("flash_for_gpus", only_on_a_gpu)
    model = family("llama")
    model.config._attn_implementation = "flash_for_gpus"
    apply_(model, gqa_plan(model, 2))
    assert model.config._attn_implementation == "flash_for_gpus"
