"""Find which inputs reach the attention blocks of a model, by running it on the meta device.

This needs no weights and no memory: only shapes and dependencies are computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.models.sites.names import CACHES
from surgery.verify.equivalence import FAULTS

LENGTH = 4


@dataclass(frozen=True)
class Reach:
    """What reached an attention block.

    Attributes:
        rotations: whether its output depends on `position_embeddings`.
        position_ids: whether `position_ids` reached it.
        fault: why it could not run; empty if it ran.
    """

    rotations: bool
    position_ids: bool
    fault: str = ""


def probe_reach(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Reach]:
    """Run `model` on the meta device and find what reaches the blocks at `paths`.

    A block that comes after something that cannot run without values (a mixture of experts) runs
    alone, with the inputs of the first block. Blocks about which nothing is known are left out.
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
        # A finished mask, since to make one needs values.
        mask = torch.zeros(1, 1, LENGTH, LENGTH, device="meta")
        model(input_ids=ids, attention_mask=mask)
    except FAULTS:
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
    leaves, replaced = _make_leaves(given.get("position_embeddings"))
    position_ids = given.get("position_ids") is not None
    if leaves:
        given["position_embeddings"] = replaced
    for name in CACHES:
        given.pop(name, None)
    try:
        with torch.enable_grad():
            output = module.forward(**given)
            first = output[0] if isinstance(output, tuple) else output
            grads = torch.autograd.grad(first.sum(), leaves, allow_unused=True) if leaves else ()
    except FAULTS as error:
        return Reach(False, position_ids, " ".join(str(error).split()))
    return Reach(any(grad is not None for grad in grads), position_ids)


def _make_leaves(given: Any) -> tuple[list[torch.Tensor], Any]:
    """Copy the rotations as leaves with gradients, which show whether they are used."""
    if isinstance(given, torch.Tensor):
        leaf = given.detach().clone().requires_grad_()
        return [leaf], leaf
    if isinstance(given, (tuple, list)) and all(isinstance(t, torch.Tensor) for t in given):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        return leaves, tuple(leaves)
    return [], given
