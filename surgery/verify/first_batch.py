"""Compute the first real batch twice: with the chosen attention backend, and with eager.

A backend may silently ignore a mask or a bias that it does not support. Eager is the reference:
every architecture has it. The comparison runs once, inside the model's own forward pass, in the
precision and on the device of that pass. It draws no random numbers, makes no gradients, fills no
cache, and no monitor sees it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, PreTrainedModel

from surgery.console import say
from surgery.errors import SurgeryError, get_first_line
from surgery.models.forward import evaluating, get_forward_options, using_implementation
from surgery.models.share_kv import get_eager_implementation
from surgery.verify.excerpt import Excerpt, cut_excerpt

# Root mean square of the difference, in standard deviations of eager's logits. They lie between
# the errors of faults (an ignored mask or bias) and of rounding: docs/operations/backend.md.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
TF32_TOLERANCE = TOLERANCES[torch.float16]  # TF32 has the mantissa of fp16
# Depth and routing increase rounding. Then eager's own rounding times this factor is allowed.
ROUNDING_FACTOR = 3
BLIND = 0.1  # above this, rounding is as large as a fault, so the check proves nothing
PIECE = 64  # positions

# The method before any monitor opens. To call it directly hides the comparison from monitors.
_GET_INTERFACE = AttentionInterface.get_interface


def check_first_batch(model: PreTrainedModel, tolerance: float | None = None) -> None:
    """Compare the present backend of `model` with eager, on the next batch.

    A printed line says how much they differ. The check runs only once, even if it is requested
    several times. It waits on the meta device, and while text is generated with a cache.

    Args:
        tolerance: largest difference; ``None``: the value of `TOLERANCES` for the dtype in use.

    Raises (from the model's forward pass):
        SurgeryError: they differ by more, or no attention used the backend.
    """
    for hook in [h for h in model._forward_pre_hooks.values() if isinstance(h, _FirstBatch)]:
        hook.remove()
    if model.config._attn_implementation == get_eager_implementation(model):
        return
    pending = _FirstBatch(tolerance)
    pending.handle = model.register_forward_pre_hook(pending, with_kwargs=True)


class _FirstBatch:
    """A forward pre-hook that compares once and then removes itself."""

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    @torch.compiler.disable
    def __call__(self, model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any]) -> None:
        names = inspect.signature(model.forward).parameters
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        part = _cut_excerpt(model, batch)
        if part is None:
            return
        self.remove()
        _compare(model, part, self.tolerance)


def _compare(model: PreTrainedModel, part: Excerpt, tolerance: float | None) -> None:
    implementation = str(model.config._attn_implementation)
    title = f"attention backend {implementation}, first batch"
    chosen, calls = _compute_logits(model, part, implementation)
    if not calls:
        raise SurgeryError(f"{title}: no attention of {type(model).__name__} used it")
    allowed = tolerance if tolerance is not None else _choose_tolerance(chosen.device, model.dtype)
    rounding = 0.0
    try:
        reference = get_eager_implementation(model)
        with using_implementation(model, reference):
            part = part._replace(inputs=_make_masks_additive(part.inputs, model.dtype))
            eager, _ = _compute_logits(model, part, reference)
            measured = _compute_distance(chosen, eager, part.real)
            if tolerance is None and measured > allowed:
                exact, _ = _compute_logits(model, part, reference, wider=True)
                rounding = _compute_distance(eager, exact, part.real)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = get_first_line(error)
        say(f"{title}: not compared, because eager cannot run this model ({reason})")
        return
    allowed = max(allowed, ROUNDING_FACTOR * rounding)
    text = (
        f"logits differ from eager's by {measured:.2g} of their standard deviation "
        f"(allowed: {allowed:.2g}; {part.text})"
    )
    if not measured <= allowed:
        raise SurgeryError(f"{title}: {text}")
    if measured > BLIND:
        text += f"; this proves nothing, because rounding alone changes them by {rounding:.2g}"
    say(f"{title}: {text}")


def _compute_logits(
    model: PreTrainedModel, part: Excerpt, implementation: str, *, wider: bool = False
) -> tuple[torch.Tensor, int]:
    """Run the model; return its logits, and how often it asked for `implementation`.

    Args:
        wider: whether attention computes in the next wider dtype.
    """
    inputs = {**part.inputs, **get_forward_options(model)}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        calls = stack.enter_context(_counting(implementation, wider))
        stack.enter_context(evaluating(model))
        stack.enter_context(_keeping_random_state(device))
        stack.enter_context(_disabling_autocast_cache())
        stack.enter_context(torch.no_grad())
        output = model.forward(**inputs)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "last_hidden_state", None)
    return (output[0] if logits is None else logits), len(calls)


def _make_masks_additive(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Turn masks [B, 1 or H, N, N] of another backend into what eager adds to its scores."""

    def convert(mask: Any) -> Any:
        if isinstance(mask, Mapping):  # by kind of layer
            return {kind: convert(each) for kind, each in mask.items()}
        if isinstance(mask, BlockMask):
            batch, heads, queries, keys = mask.shape
            device = mask.kv_num_blocks.device
            mask = create_mask(mask.mask_mod, batch, heads, queries, keys, device)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.dtype != torch.bool:
            return mask
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return added.masked_fill_(~mask, torch.finfo(dtype).min)

    return {k: convert(v) if k == "attention_mask" else v for k, v in inputs.items()}


def _compute_distance(
    chosen: torch.Tensor, eager: torch.Tensor, real: torch.Tensor | None
) -> float:
    """Compute the root mean square of the difference, in standard deviations of eager's logits."""
    width = eager.shape[-1]
    if real is not None and real.shape == eager.shape[:-1]:
        chosen, eager = chosen[real], eager[real]
    chosen, eager = chosen.reshape(-1, width), eager.reshape(-1, width)
    if not torch.isfinite(eager).all():
        raise SurgeryError("attention backend: eager's own logits are not finite on this batch")
    # In pieces: all logits of a large vocabulary in fp64 may not fit into memory.
    squares, total, count = 0.0, 0.0, max(eager.numel(), 1)
    mean = sum(float(piece.double().sum()) for piece in eager.split(PIECE)) / count
    for a, b in zip(chosen.split(PIECE), eager.split(PIECE), strict=True):
        squares += float((a.double() - b.double()).square().sum())
        total += float((b.double() - mean).square().sum())
    return math.sqrt(squares / total) if total else math.sqrt(squares / count)


def _choose_tolerance(device: torch.device, dtype: torch.dtype) -> float:
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cuda" and dtype is torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return TOLERANCES[dtype] if exact else TF32_TOLERANCE
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def _cut_excerpt(model: PreTrainedModel, batch: Mapping[str, Any]) -> Excerpt | None:
    tensors = [next(model.parameters()), *batch.values()]
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors):
        return None
    return cut_excerpt(
        batch, encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False))
    )


@contextmanager
def _counting(implementation: str, wider: bool) -> Iterator[list[str]]:
    """List each request of a block for `implementation`, hidden from open monitors."""
    calls: list[str] = []
    original = AttentionInterface.get_interface

    def get_and_count(interface: AttentionInterface, name: str, default: Callable[..., Any]) -> Any:
        if (name or "eager") == implementation:
            calls.append(name)
        attention = _GET_INTERFACE(interface, name, default)
        return partial(_attend_widened, attention) if wider else attention

    AttentionInterface.get_interface = get_and_count  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


def _attend_widened(
    attention: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **options: Any,
) -> Any:
    dtype = query.dtype
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        output, *rest = attention(
            module, query.to(wide), key.to(wide), value.to(wide), *args, **options
        )
    return output.to(dtype), *rest


@contextmanager
def _keeping_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _disabling_autocast_cache() -> Iterator[None]:
    """Turn off the autocast cache: older versions of torch would reuse its weights in training."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
