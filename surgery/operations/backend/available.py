"""Which attention backends a model can run on a device, and which of them is the fastest."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import is_kernel
from transformers.utils import import_utils

from surgery.models.dropout import DROPS_NOTHING

FAST = "fast"
# The best first. Flex beats eager, and needs a compiler; on a CPU it has no backward pass.
_ON_CUDA = (
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "sdpa",
    "flex_attention",
    "eager",
)
_ELSEWHERE = tuple(name for name in _ON_CUDA if name != "flex_attention")
KNOWN = tuple(reversed(_ON_CUDA))


class _Flash(NamedTuple):
    """What a flash-attention package asks for.

    `capability` is the lowest and the highest major number of CUDA's compute capability.
    """

    package: str
    module: str
    capability: tuple[int, int]
    head_dim: int


# From the packages' own READMEs and transformers' compatibility matrix.
_FLASH = {
    "flash_attention_2": _Flash("flash-attn", "flash_attn", (8, 99), 256),
    "flash_attention_3": _Flash("flash-attn-3", "flash_attn_interface", (8, 9), 256),
    "flash_attention_4": _Flash("flash-attn-4", "flash_attn.cute", (9, 99), 128),
}
_FLEX_MIN_HEAD_DIM = 16  # on CUDA


@dataclass(frozen=True)
class Need:
    """What is asked of a backend.

    Attributes:
        model: read for its classes, config and dtype; it may live on the meta device.
        device: where it will run: ``cpu``, ``cuda:0``, …
        head_dims: of its attention blocks.
        dropout: the highest attention dropout of any of them.
    """

    model: PreTrainedModel
    device: str
    head_dims: tuple[int, ...] = ()
    dropout: float = 0.0

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def is_half(self) -> bool:
        return self.model.dtype in (torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """The backend to use, and one line that says why not a better one."""

    implementation: str
    line: str


def choose_backend(need: Need) -> Choice:
    """Choose the fastest backend that this model, device and environment really have."""
    passed: dict[str, list[str]] = {}
    order = _ON_CUDA if need.on_cuda else _ELSEWHERE
    for name in order:
        reason = find_obstacle(name, need) or _find_dtype_obstacle(name, need)
        if not reason:
            return Choice(name, _format_line(name, passed))
        passed.setdefault(reason, []).append(name)
    # A model that brings its own attention runs what it was built with.
    current = need.model.config._attn_implementation
    return Choice(current, _format_line(current, passed))


def _format_line(chosen: str, passed: dict[str, list[str]]) -> str:
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in passed.items())
    return f"attention backend: {chosen}" + (f" ({reasons})" if reasons else "")


def list_available(need: Need) -> list[str]:
    """List all backends, by name, that `need` can have; the fastest last."""
    return [name for name in KNOWN if not find_obstacle(name, need)]


def find_obstacle(implementation: str, need: Need) -> str:
    """Find why `need` cannot have a backend; "" if it can.

    The dtype is not looked at: mixed precision may still change what attention computes in.
    """
    own = _find_own_attention(need.model)
    if own:
        running = need.model.config._attn_implementation
        return "" if implementation == running else f"{own} brings attention code of its own"
    if is_kernel(implementation):
        return _find_kernel_obstacle(need.model)
    if implementation in _FLASH:
        return _find_flash_obstacle(implementation, need)
    others: dict[str, Callable[[Need], str]] = {
        "eager": lambda need: "",
        "sdpa": _find_sdpa_obstacle,
        "flex_attention": _find_flex_obstacle,
    }
    check = others.get(implementation)
    return check(need) if check else "there is no such backend"


def find_warning(implementation: str, need: Need) -> str:
    """Find what may still go wrong with a backend that has no obstacle; "" if nothing."""
    if implementation == "flex_attention" and not need.on_cuda:
        return f"flex_attention has no backward pass on {need.device}: it cannot train there"
    reason = _find_dtype_obstacle(implementation, need)
    return f"{implementation} {reason}: set trainer.precision or model.dtype" if reason else ""


def _find_dtype_obstacle(implementation: str, need: Need) -> str:
    if implementation not in _FLASH or need.is_half:
        return ""
    return f"computes in fp16 or bf16, and the model is {str(need.model.dtype).split('.')[-1]}"


def _find_flash_obstacle(implementation: str, need: Need) -> str:
    flash = _FLASH[implementation]
    if not need.on_cuda:
        return "needs CUDA"
    for check in (
        _find_unsupported("_supports_flash_attn", need.model),
        _find_incompatible(implementation, need.model),
        _find_missing_package(implementation, flash),
        _find_wrong_capability(flash, need.device),
        _find_wrong_head_dim(flash, need.head_dims),
        _find_dropout_obstacle(implementation, need),
    ):
        if check:
            return check
    return ""


def _find_sdpa_obstacle(need: Need) -> str:
    lacking = _find_unsupported("_supports_sdpa", need.model)
    return lacking or ("has no soft cap" if _has_soft_cap(need.model) else "")


def _find_flex_obstacle(need: Need) -> str:
    lacking = _find_unsupported("_supports_flex_attn", need.model)
    if lacking:
        return lacking
    if not import_utils.is_torch_flex_attn_available():
        return "is not in this torch"
    if _find_dropout_obstacle("flex_attention", need):
        return _find_dropout_obstacle("flex_attention", need)
    if need.on_cuda and need.head_dims and min(need.head_dims) < _FLEX_MIN_HEAD_DIM:
        return f"takes heads of {_FLEX_MIN_HEAD_DIM} or wider, not {min(need.head_dims)}"
    return ""


def _find_dropout_obstacle(implementation: str, need: Need) -> str:
    if not need.dropout or implementation not in DROPS_NOTHING:
        return ""
    return f"has no dropout, and attention drops {need.dropout:g}"


def _find_kernel_obstacle(model: PreTrainedModel) -> str:
    if not import_utils.is_kernels_available():
        return "the package `kernels` is not installed"
    return _find_unsupported("_supports_flash_attn", model)


def _find_own_attention(model: PreTrainedModel) -> str:
    """Find a class whose attention is not transformers' interface; "" if there is none."""
    return next(
        (k.__name__ for k in _list_classes(model) if not k._can_set_attn_implementation()), ""
    )


def _find_unsupported(flag: str, model: PreTrainedModel) -> str:
    lacking = next((kind for kind in _list_classes(model) if not getattr(kind, flag, False)), None)
    return f"{lacking.__name__} does not support it" if lacking else ""


def _list_classes(model: PreTrainedModel) -> Sequence[type[PreTrainedModel]]:
    """List the classes of the model and of the models within it."""
    kinds = (type(part) for part in model.modules() if isinstance(part, PreTrainedModel))
    return list(dict.fromkeys(kinds))


def _find_incompatible(implementation: str, model: PreTrainedModel) -> str:
    """Find a class that names the kernels it can run with, this one not among them."""
    for kind in _list_classes(model):
        named = getattr(kind, "_compatible_flash_implementations", None)
        if named and implementation not in named:
            return f"{kind.__name__} runs with {', '.join(named)} only"
    return ""


def _find_missing_package(implementation: str, flash: _Flash) -> str:
    # transformers looks at the name of the package: two of them share a module.
    installed = getattr(import_utils, f"is_flash_attn_{implementation[-1]}_available", None)
    if installed is None or not installed():
        return "not installed"
    try:
        importlib.import_module(flash.module)
    except Exception as error:  # compiled for another torch, it may raise anything
        return f"{flash.package} cannot be imported: {' '.join(str(error).split())}"
    return ""


def _find_wrong_capability(flash: _Flash, device: str) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device here"
    lowest, highest = flash.capability
    major, minor = torch.cuda.get_device_capability(device)
    if lowest <= major <= highest:
        return ""
    wanted = f"{lowest}.0 or higher" if highest == 99 else f"{lowest}.x to {highest}.x"
    return f"needs compute capability {wanted}, not {major}.{minor}"


def _find_wrong_head_dim(flash: _Flash, head_dims: Sequence[int]) -> str:
    wrong = [d for d in head_dims if d > flash.head_dim or d % 8]
    if not wrong:
        return ""
    return f"takes heads up to {flash.head_dim} wide, in steps of 8, not {wrong[0]}"


def _has_soft_cap(model: PreTrainedModel) -> bool:
    """Whether a block caps its scores: it holds a cap, and passes it to its attention."""
    return any(
        getattr(module, "attn_logit_softcapping", None) is not None
        and "softcap=" in inspect.getsource(type(module).forward)
        for module in model.modules()
    )
