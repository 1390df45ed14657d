"""GQA by hand: heads rewritten one by one in the original's own shapes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations


def gqa_plan(model: PreTrainedModel, kv_heads: int, seed: int = 0, **options: object) -> Plan:
    operations = parse_operations({"gqa": {"kv_heads": kv_heads, **options}})
    return make_plan(model, operations, seed=seed)


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The attention blocks with keys to share, in order, found without the code under test."""
    return [m for m in model.modules() if hasattr(m, "k_proj") and hasattr(m, "v_proj")]


def kv_tensors(module: torch.nn.Module, head_dim: int, kv_heads: int) -> list[torch.nn.Parameter]:
    """Everything of a block that has rows per KV head: weights, biases, a norm over all heads."""
    found = [p for name in ("k_proj", "v_proj") for p in getattr(module, name).parameters()]
    norm = getattr(module, "k_norm", None)
    if norm is not None:
        found += [p for p in norm.parameters() if p.numel() == kv_heads * head_dim != head_dim]
    return found


@torch.no_grad()
def share_by_hand_(
    model: PreTrainedModel,
    *,
    kv_heads: int,
    groups: int,
    head_dim: int,
    merge: str = "mean",
    layers: list[int] | None = None,
) -> None:
    """Give every KV head of a group the group's mean, or its first head, keeping all shapes."""
    group = kv_heads // groups
    modules = attention_modules(model)
    for module in modules if layers is None else [modules[layer] for layer in layers]:
        for tensor in kv_tensors(module, head_dim, kv_heads):
            old = tensor.clone()
            for head in range(kv_heads):
                members = range(head // group * group, (head // group + 1) * group)
                rows = [old[m * head_dim : (m + 1) * head_dim] for m in members]
                new = rows[0] if merge == "first" else sum(rows[1:], rows[0]) / group
                tensor[head * head_dim : (head + 1) * head_dim] = new
