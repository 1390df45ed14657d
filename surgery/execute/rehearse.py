"""The oracle before the operation: does each site, changed, compute what it should?

A site with merged heads must give what the untouched site gives when each merged head stands in
for every member of its group. Both are run, on the inputs the site gets from the model itself, with
the new tensors swapped in for the moment. This catches a forward that pairs heads in its own way,
or holds a head count somewhere that nobody updated. Nothing of the model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import Cache, PreTrainedModel

from surgery.anatomy import text_config
from surgery.errors import PlanError
from surgery.execute.attributes import attributes_set
from surgery.execute.transforms import run_equivalent, run_transform
from surgery.models.forward import no_cache
from surgery.plan.edits import TensorEdit
from surgery.plan.plan import Plan

TOKENS = 16
TF32_EPS = 2.0**-10

Tensors = dict[str, torch.Tensor]


def rehearse(model: PreTrainedModel, plan: Plan) -> None:
    """Check every changed site of `plan` in one forward pass over `TOKENS` tokens.

    Raises:
        PlanError: a changed site computes something else, was never run, or could not be.
    """
    differences: dict[str, float] = {}
    edits: dict[str, list[TensorEdit]] = {}
    for change in plan.changes:
        edits.setdefault(change.before.path, []).extend(change.edits)

    def hook(path: str) -> Any:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path not in differences:  # also ends the recursion of the calls below
                differences[path] = math.inf
                # Some models cache whatever they are told; both calls must start without.
                args = tuple(None if isinstance(value, Cache) else value for value in args)
                kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
                differences[path] = _difference(module, path, edits[path], plan, args, kwargs)

        return compare

    handles = [
        model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
        for path in edits
    ]
    try:
        with _evaluating(model), _runnable_here(model), torch.no_grad():
            model(**_inputs(model))
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        stuck = [f"{path} with its new heads" for path, d in differences.items() if d == math.inf]
        what = stuck[0] if stuck else "the model"
        raise PlanError(f"{what} cannot be run: {str(error).strip().splitlines()[0]}") from error
    finally:
        for handle in handles:
            handle.remove()
    for path in edits:
        if path not in differences:
            raise PlanError(f"{path} took no part in a forward pass, so it cannot be checked")
        if not differences[path] <= _tolerance(model.get_submodule(path)):
            raise PlanError(
                f"{path} does not share its KV heads as planned: with merged heads its output is "
                f"off by {differences[path]:.2g} of its size"
            )


def _difference(
    module: nn.Module, path: str, edits: list[TensorEdit], plan: Plan, args: Any, kwargs: Any
) -> float:
    """Relative distance between the changed site and its equivalent in the old shape."""
    narrow, wide = _tensors(module, path, edits)
    within = {
        name: values
        for name, values in plan.attributes.items()
        if name == path or name.startswith(f"{path}.")
    }
    local = {name[len(path) + 1 :]: values for name, values in within.items()}
    with attributes_set(module, local):
        changed = _first(functional_call(module, narrow, args, kwargs))
    # Last, so that what a site hands on to later ones has the shape they expect.
    expected = _first(functional_call(module, wide, args, kwargs))
    size = expected.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((changed - expected).float().norm() / size)


def _tensors(module: nn.Module, path: str, edits: list[TensorEdit]) -> tuple[Tensors, Tensors]:
    """The site's new parameters, and those that do the same in the old shapes; local names."""
    new = {f"{path}.{name}": p.detach() for name, p in module.named_parameters()}
    for edit in edits:
        results = run_transform(edit.transform, [new[s.name] for s in edit.sources], edit.arguments)
        new |= {spec.name: tensor for spec, tensor in zip(edit.results, results, strict=True)}
    old = dict(new)
    for edit in reversed(edits):
        wide = run_equivalent(edit.transform, [old[r.name] for r in edit.results], edit.arguments)
        old |= {spec.name: tensor for spec, tensor in zip(edit.sources, wide, strict=True)}
    return (
        {name[len(path) + 1 :]: tensor for name, tensor in new.items()},
        {name[len(path) + 1 :]: tensor for name, tensor in old.items()},
    )


def _first(output: Any) -> torch.Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    vocabulary = text_config(model.config).vocab_size
    # Neither all alike nor the first ones, which often are special.
    tokens = torch.arange(3, 3 + TOKENS, device=model.device)[None] % vocabulary
    return {"input_ids": tokens, **no_cache(model)}


def _tolerance(module: nn.Module) -> float:
    """A head in the wrong place is off by about 1; rounding is far below the root of epsilon."""
    parameter = next(module.parameters())
    # Norms and softmax are computed in fp32 in fp64 models too.
    eps = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)
    if parameter.is_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, TF32_EPS)
    return math.sqrt(eps)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _runnable_here(model: PreTrainedModel) -> Iterator[None]:
    """Flash kernels have no CPU side, and models are operated on before they move to a GPU."""
    text = text_config(model.config)
    implementation = text._attn_implementation
    if model.device.type != "cpu" or "flash" not in str(implementation):
        yield
        return
    text._attn_implementation = "eager"
    try:
        yield
    finally:
        text._attn_implementation = implementation
