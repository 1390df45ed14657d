"""The oracle of a conversion: the old and the new model compute the same."""

from __future__ import annotations

import math

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.models.convert.absolute import PAIRS
from surgery.models.forward import evaluating
from surgery.verify.equivalence import TF32_EPS, avoiding_flash_on_cpu

TOKENS = 16
TOLERANCE = 1e-5
# Matrices side by side are multiplied by another kernel there than each alone. On thirty layers of
# width 576 that came to 1.9e-5, where a processor gave the same bits.
CUDA_TOLERANCE = 1e-4
_TABLES = {pair.source: pair.positions for pair in PAIRS}


def check_conversion(
    old: PreTrainedModel, new: PreTrainedModel, positions_dropped: bool = False
) -> float:
    """Compare the logits of both models on `TOKENS` tokens. Neither model is changed.

    Args:
        positions_dropped: whether learned positions were dropped. Then only the rest is compared:
            the old model with a table of zeros, the new one with frequencies of zero.

    Returns:
        Relative difference |new - old| / |old| of all logits.

    Raises:
        PlanError: the difference is above `TOLERANCE`, or `CUDA_TOLERANCE`, in fp32 and wider, or
            above rounding in narrower dtypes.
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
    # Different tokens, but not the first ones of the vocabulary, which are often special.
    tokens = torch.arange(3, 3 + TOKENS, device=old.device)[None] % vocabulary
    inputs = {"input_ids": tokens, "use_cache": False}
    with (
        torch.no_grad(),
        evaluating(old),
        evaluating(new),
        avoiding_flash_on_cpu(old),
        avoiding_flash_on_cpu(new),
    ):
        expected = functional_call(old, old_tensors, (), inputs).logits.double()
        actual = functional_call(new, new_tensors, (), inputs).logits.double()
    size = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    difference = float((actual - expected).norm() / size)
    tolerance = _choose_tolerance(new)
    if not difference <= tolerance:
        raise PlanError(
            f"the {type(new).__name__} does not compute the same as the {type(old).__name__}: "
            f"logits differ by {difference:.1e}, more than {tolerance:.1e}"
        )
    return difference


def _choose_tolerance(model: PreTrainedModel) -> float:
    parameter = next(model.parameters())
    eps = torch.finfo(parameter.dtype).eps
    if parameter.is_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, TF32_EPS)
    if eps > torch.finfo(torch.float32).eps:
        return math.sqrt(eps)
    return CUDA_TOLERANCE if parameter.is_cuda else TOLERANCE
