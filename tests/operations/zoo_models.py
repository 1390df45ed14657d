"""Tiny models of many architectures, operated on and compared with oracles that were not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.coverage import shrink, zoo
from surgery.execute.live import apply_
from surgery.models.tiny import randomize_
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations


def build(
    kind: str,
    model_type: str,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    **fields: Any,
) -> PreTrainedModel:
    """In fp64, so that what is equal is equal to far below 1e-6; `fields` override the config's."""
    if not fields:
        return zoo.tiny_model(kind, model_type, kv_heads=kv_heads, dtype=dtype, attention=attention)
    config = shrink.tiny_config(
        model_type, decoder=kind == "causal-lm", kv_heads=kv_heads, **fields
    )
    model = zoo.KINDS[kind].from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    return randomize_(model, 0).eval().to(dtype)


def plan_of(model: PreTrainedModel, attention: Mapping[str, Any], **options: Any) -> Plan:
    return make_plan(model, parse_operations(attention), **options)


def operated(model: PreTrainedModel, **attention: Any) -> tuple[PreTrainedModel, Plan]:
    plan = plan_of(model, attention)
    return apply_(model, plan), plan


def logits(kind: str, model: PreTrainedModel) -> Tensor:
    found = zoo.logits(model, zoo.inputs(kind, model))
    assert found.isfinite().all()
    return found


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest logit: norms and routers compute in fp32 whatever the weights."""
    atol = 1e-6 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_other(actual: Tensor, expected: Tensor) -> None:
    """Else a comparison with either would show nothing."""
    assert float((actual - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())
