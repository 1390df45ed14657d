"""The first real batch, computed twice: with the chosen attention backend, and with eager.

A backend may drop a mask or a bias that it does not know, and say nothing. Eager is the reference
that every architecture comes with. The comparison runs once, inside the model's own forward pass,
under the precision and on the device of that pass; it draws no random number, gives no gradient,
fills no cache, and is seen by no monitor.
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
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from surgery.console import say
from surgery.errors import SurgeryError
from surgery.models.forward import get_forward_options
from surgery.models.share_kv import get_eager_implementation
from surgery.verify.excerpt import Excerpt, excerpt

# Root mean square of the difference, in standard deviations of eager's logits. Faults (a mask or a
# bias left out) and rounding were measured: docs/operations/backend.md.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
TF32_TOLERANCE = TOLERANCES[torch.float16]  # TF32 has the mantissa of fp16
# Depth and routing multiply rounding; then eager's own rounding, times this, is what is allowed.
ROUNDING_FACTOR = 3
BLIND = 0.1  # where even that is as large as a fault, nothing can be told
PIECE = 64  # positions

# As it is before any monitor opens; called directly, it lets none of them see the comparison.
_GET_INTERFACE = AttentionInterface.get_interface


def first_batch_check(model: PreTrainedModel, tolerance: float | None = None) -> None:
    """Compare the backend that `model` has now with eager, on the next batch it is given.

    One line says how far apart they were. Asked for again, it is still done once. On the meta
    device, and while text is being generated from a cache, it waits.

    Args:
        tolerance: see `TOLERANCES`, whose value for the dtype in use ``None`` stands for.

    Raises (from the model's forward pass):
        SurgeryError: they are farther apart than that, or no attention went through the backend.
    """
    for hook in [h for h in model._forward_pre_hooks.values() if isinstance(h, _FirstBatch)]:
        hook.remove()
    if model.config._attn_implementation == get_eager_implementation(model):
        return
    pending = _FirstBatch(tolerance)
    pending.handle = model.register_forward_pre_hook(pending, with_kwargs=True)


class _FirstBatch:
    """A forward pre-hook that compares, and then is gone."""

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
        part = _excerpt(model, batch)
        if part is None:
            return
        self.remove()
        _compare(model, part, self.tolerance)


def _compare(model: PreTrainedModel, part: Excerpt, tolerance: float | None) -> None:
    implementation = str(model.config._attn_implementation)
    title = f"attention backend {implementation}, first batch"
    chosen, calls = _logits(model, part, implementation)
    if not calls:
        raise SurgeryError(
            f"{title}: no attention of {type(model).__name__} went through it, so it is not in use"
        )
    allowed = tolerance if tolerance is not None else _tolerance(chosen.device, model.dtype)
    rounding = 0.0
    try:
        reference = get_eager_implementation(model)
        with _everywhere(model, reference):
            eager, _ = _logits(model, part, reference)
            measured = _distance(chosen, eager, part.real)
            if tolerance is None and measured > allowed:
                exact, _ = _logits(model, part, reference, wider=True)
                rounding = _distance(eager, exact, part.real)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"{title}: not compared, since eager cannot run this model ({reason})")
        return
    allowed = max(allowed, ROUNDING_FACTOR * rounding)
    text = (
        f"logits differ from eager's by {measured:.2g} of their standard deviation "
        f"(allowed: {allowed:.2g}; {part.text})"
    )
    if not measured <= allowed:
        raise SurgeryError(f"{title}: {text}")
    if measured > BLIND:
        text += f"; that proves nothing, since rounding alone moves them by {rounding:.2g}"
    say(f"{title}: {text}")


def _logits(
    model: PreTrainedModel, part: Excerpt, implementation: str, *, wider: bool = False
) -> tuple[torch.Tensor, int]:
    """What the model gives, and how often it asked for `implementation`.

    Args:
        wider: let attention compute in the next wider dtype.
    """
    inputs = {**part.inputs, **get_forward_options(model)}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        calls = stack.enter_context(_counting(implementation, wider))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_same_random_numbers(device))
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(torch.no_grad())
        output = model.forward(**inputs)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "last_hidden_state", None)
    return (output[0] if logits is None else logits), len(calls)


def _distance(chosen: torch.Tensor, eager: torch.Tensor, real: torch.Tensor | None) -> float:
    """Root mean square of the difference, in standard deviations of eager's logits."""
    width = eager.shape[-1]
    if real is not None and real.shape == eager.shape[:-1]:
        chosen, eager = chosen[real], eager[real]
    chosen, eager = chosen.reshape(-1, width), eager.reshape(-1, width)
    if not torch.isfinite(eager).all():
        raise SurgeryError("attention backend: eager's own logits are not finite on this batch")
    # Piece by piece: all logits of a large vocabulary in fp32 are more than a model may spare.
    squares, total, count = 0.0, 0.0, max(eager.numel(), 1)
    mean = sum(float(piece.double().sum()) for piece in eager.split(PIECE)) / count
    for a, b in zip(chosen.split(PIECE), eager.split(PIECE), strict=True):
        squares += float((a.double() - b.double()).square().sum())
        total += float((b.double() - mean).square().sum())
    return math.sqrt(squares / total) if total else math.sqrt(squares / count)


def _tolerance(device: torch.device, dtype: torch.dtype) -> float:
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cuda" and dtype is torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return TOLERANCES[dtype] if exact else TF32_TOLERANCE
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def _excerpt(model: PreTrainedModel, batch: Mapping[str, Any]) -> Excerpt | None:
    tensors = [next(model.parameters()), *batch.values()]
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors):
        return None
    return excerpt(batch, encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)))


@contextmanager
def _counting(implementation: str, wider: bool) -> Iterator[list[str]]:
    """One entry per block that asks for `implementation`; no open monitor sees any of it."""
    calls: list[str] = []
    standing = AttentionInterface.get_interface

    def get(interface: AttentionInterface, name: str, default: Callable[..., Any]) -> Any:
        if (name or "eager") == implementation:
            calls.append(name)
        attention = _GET_INTERFACE(interface, name, default)
        return partial(_widened, attention) if wider else attention

    AttentionInterface.get_interface = get  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        AttentionInterface.get_interface = standing  # type: ignore[method-assign]


def _widened(
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
def _everywhere(model: nn.Module, implementation: str) -> Iterator[None]:
    """Another backend for a while, in the config of every part of the model."""
    held: dict[int, tuple[PreTrainedConfig, str | None]] = {}
    for module in model.modules():
        for config in _with_parts(getattr(module, "config", None)):
            held.setdefault(id(config), (config, config._attn_implementation))
    try:
        for config, _ in held.values():
            config._attn_implementation = implementation
        yield
    finally:
        for config, before in held.values():  # a config before its parts: setting goes downwards
            config._attn_implementation = before


def _with_parts(config: Any) -> Iterator[PreTrainedConfig]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in config.sub_configs:
            yield from _with_parts(getattr(config, name, None))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights cast here carry no gradient; older versions of torch hand them on to training."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
