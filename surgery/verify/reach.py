"""What reaches the attention blocks of a model, found by running it on the meta device.

No weight and no memory is needed: only shapes are computed, and which results depend on what.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

LENGTH = 4
_FAULTS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Reach:
    """What an attention block was given.

    Attributes:
        rotations: whether its output depends on `position_embeddings`.
        position_ids: whether these reached it.
        fault: why it could not be run; empty if it could.
    """

    rotations: bool
    position_ids: bool
    fault: str = ""


def probe(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Reach]:
    """Run `model`, on the meta device, and see what reaches the blocks at `paths`.

    A block behind something that cannot be run without numbers (a mixture of experts) is run alone,
    with what the first block was given. Blocks about which nothing could be learned are left out.
    """
    reach: dict[str, Reach] = {}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(path: str) -> Any:
        def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if path not in reach:
                calls.append((args, kwargs))
                reach[path] = _run(module, args, kwargs)
            return args, kwargs

        return run

    blocks = {path: model.get_submodule(path) for path in paths}
    handles = [
        block.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, block in blocks.items()
    ]
    try:
        ids = torch.ones(1, LENGTH, dtype=torch.long, device="meta")
        # A finished mask: making one reads numbers.
        mask = torch.zeros(1, 1, LENGTH, LENGTH, device="meta")
        model(input_ids=ids, attention_mask=mask)
    except _FAULTS:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if calls:
        for path, block in blocks.items():
            if path not in reach and type(block) is type(blocks[next(iter(reach))]):
                reach[path] = _run(block, *calls[0])
    return reach


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reach:
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    leaves, replaced = _leaves(given.get("position_embeddings"))
    position_ids = given.get("position_ids") is not None
    if leaves:
        given["position_embeddings"] = replaced
    for name in ("past_key_values", "past_key_value"):
        given.pop(name, None)
    try:
        with torch.enable_grad():
            output = module.forward(**given)
            first = output[0] if isinstance(output, tuple) else output
            grads = torch.autograd.grad(first.sum(), leaves, allow_unused=True) if leaves else ()
    except _FAULTS as error:
        return Reach(False, position_ids, " ".join(str(error).split()))
    return Reach(any(grad is not None for grad in grads), position_ids)


def _leaves(given: Any) -> tuple[list[torch.Tensor], Any]:
    """Copies of the rotations through which it shows whether they are used."""
    if isinstance(given, torch.Tensor):
        leaf = given.detach().clone().requires_grad_()
        return [leaf], leaf
    if isinstance(given, (tuple, list)) and all(isinstance(t, torch.Tensor) for t in given):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        return leaves, tuple(leaves)
    return [], given
