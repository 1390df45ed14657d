"""The oracle of a move: old and new compute the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.models.convert.absolute import PAIRS

TOKENS = 16
TOLERANCE = 1e-5
_TF32_EPS = 2.0**-10
_TABLES = {pair.source: pair.positions for pair in PAIRS}


def check_conversion(
    old: PreTrainedModel, new: PreTrainedModel, positions_dropped: bool = False
) -> float:
    """Compare the logits of both on `TOKENS` tokens. Neither model is changed.

    Args:
        positions_dropped: learned positions were left behind. Then the rest is compared: the old
            model with a table of zeros, the new one with frequencies of zero.

    Returns:
        Relative difference |new - old| / |old| of all logits.

    Raises:
        PlanError: more than `TOLERANCE` for fp32 and wider, more than rounding for others.
    """
    old_tensors: dict[str, torch.Tensor] = {}
    new_tensors: dict[str, torch.Tensor] = {}
    if positions_dropped:
        table = _TABLES[old.config.model_type]
        assert table is not None
        old_tensors = {table: torch.zeros_like(old.get_parameter(table))}
        new_tensors = {
            name: torch.zeros_like(buffer)
            for name, buffer in new.named_buffers()
            if name.endswith("inv_freq")
        }
    vocabulary = old.config.vocab_size
    # Neither all alike nor the first ones, which often are special.
    tokens = torch.arange(3, 3 + TOKENS, device=old.device)[None] % vocabulary
    inputs = {"input_ids": tokens, "use_cache": False}
    with torch.no_grad(), _as_used(old), _as_used(new):
        expected = functional_call(old, old_tensors, (), inputs).logits.double()
        found = functional_call(new, new_tensors, (), inputs).logits.double()
    size = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    difference = float((found - expected).norm() / size)
    tolerance = _tolerance(new)
    if not difference <= tolerance:
        raise PlanError(
            f"the {type(new).__name__} computes something else than the {type(old).__name__}: "
            f"logits differ by {difference:.1e}, more than {tolerance:.1e}"
        )
    return difference


def _tolerance(model: PreTrainedModel) -> float:
    parameter = next(model.parameters())
    eps = torch.finfo(parameter.dtype).eps
    if parameter.is_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, _TF32_EPS)
    return TOLERANCE if eps <= torch.finfo(torch.float32).eps else math.sqrt(eps)


@contextmanager
def _as_used(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without a flash kernel where there is no GPU yet."""
    training = [module for module in model.modules() if module.training]
    implementation = model.config._attn_implementation
    replaced = model.device.type == "cpu" and "flash" in str(implementation)
    model.eval()
    if replaced:
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        if replaced:
            model.config._attn_implementation = implementation
        for module in training:
            module.training = True
