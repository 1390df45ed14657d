"""The shape check: try new heads on the meta device, where shapes show what cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from surgery.errors import ConfigError, get_first_line
from surgery.models.attributes import Attributes, set_attributes
from surgery.models.config import make_head_count_patch, patching_config
from surgery.models.copies import make_meta_copy
from surgery.models.forward import make_probe_inputs
from surgery.models.reference import ReferenceModels
from surgery.models.share_kv import sharing_kv
from surgery.models.sites import Site
from surgery.transforms.edits import SiteChange, TensorEdit
from surgery.verify.equivalence import (
    FAULTS,
    choose_tolerance,
    compute_relative_distance,
    group_edits_by_site,
    make_site_tensors,
    run_block,
    setting_block_attributes,
    visit_sites,
)

Faults = dict[str, dict[int, str]]


def pick_attributes(
    old: Site, new: Site, guesses: Sequence[Attributes], faults: Mapping[int, str]
) -> Attributes:
    """Pick the first guess of attributes with which the forward of the site runs.

    The equivalence check decides about a block that is not reached on the meta device.
    """
    number = next((n for n in range(len(guesses)) if n not in faults), None)
    if number is None:
        counts = f"{new.q_heads} query and {new.kv_heads} KV heads of {new.head_dim}"
        raise ConfigError(
            "attention",
            f"the forward of {old.path} does not take {counts}: {faults[0]}",
            given=counts,
            valid=f"the {old.q_heads} query and {old.kv_heads} KV heads it has",
        )
    return guesses[number]


def find_head_patch(
    model: PreTrainedModel,
    before: Sequence[Site],
    after: Sequence[Site],
    references: ReferenceModels,
) -> dict[str, Any]:
    """Find the patch of the result's config, for forwards that read it as they run (Phi-3)."""
    patch = make_head_count_patch(model.config, before, after) or {}
    try:
        references.get(patch)
    except ConfigError:
        return {}
    return patch


def try_sites(
    model: PreTrainedModel,
    sites: Sequence[Site],
    changes: Sequence[SiteChange],
    options: Mapping[str, Sequence[Attributes]],
    patch: Mapping[str, Any],
) -> tuple[Faults, bool | None]:
    """Try the forward of every site with each guess of attributes in `options`.

    Of blocks that are alike and change in the same way, only one is tried.

    Returns:
        Site path → number of the guess → what the forward raised with it; and whether the
        unchanged model runs on the meta device with a mask (``True``), without one (``False``), or
        not at all (``None``).
    """
    copied = make_meta_copy(model)
    edits = group_edits_by_site(changes)
    first: dict[str, Site] = {}
    alike = {
        site.path: first.setdefault(_describe_block(copied, site, edits[site.path]), site)
        for site in sites
    }
    faults, mask = _find_faults(copied, list(first.values()), edits, options, patch)
    return {path: faults[one.path] for path, one in alike.items() if one.path in faults}, mask


def _describe_block(model: PreTrainedModel, site: Site, edits: Sequence[TensorEdit]) -> str:
    block = model.get_submodule(site.block)
    shapes = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    return repr((type(block), shapes, [(e.transform, e.arguments) for e in edits]))


def _find_faults(
    copied: PreTrainedModel,
    sites: Sequence[Site],
    edits: Mapping[str, Sequence[TensorEdit]],
    options: Mapping[str, Sequence[Attributes]],
    patch: Mapping[str, Any],
) -> tuple[Faults, bool | None]:
    faults: Faults = {}
    passed: bool | None = None
    arguments: dict[type, tuple[Any, Any]] = {}

    def attempt(site: Site, block: nn.Module, args: Any, kwargs: Any) -> None:
        narrow, wide = make_site_tensors(block, site, edits[site.path], _make_hollow)
        try:
            expected = run_block(block, wide, args, kwargs).shape
        except FAULTS:
            return  # the unchanged block does not run on the meta device, so nothing can be tried
        faults[site.path] = {}
        for number, attributes in enumerate(options[site.path]):
            with (
                setting_block_attributes(block, site, attributes),
                patching_config(copied.config, patch),
            ):
                faults[site.path] |= _find_fault(number, block, narrow, args, kwargs, expected)
        faults[site.path] |= _find_misreadings(
            block,
            site,
            edits[site.path],
            options[site.path],
            faults[site.path],
            partial(patching_config, copied.config, patch),
            args,
            kwargs,
        )
        # Last, so that values that later blocks read from this one have the shape they expect.
        with suppress(*FAULTS):
            run_block(block, wide, args, kwargs)

    def visit(site: Site) -> Any:
        def visit_block(block: nn.Module, args: Any, kwargs: Any) -> None:
            arguments[type(block)] = args, kwargs
            attempt(site, block, args, kwargs)

        return visit_block

    with sharing_kv(copied, True), torch.no_grad():
        # Some models read the values of a mask, others those of position ids if there is no mask.
        # Neither has values here. Blocks before the fault are visited in any case.
        for mask in (True, False):
            left = [site for site in sites if site.path not in faults]
            with suppress(*FAULTS):
                visit_sites(copied, left, visit, mask=mask)
                passed = mask
                break
        # Experts choose by values, so layers after them are not reached: call these like others.
        for site in sites:
            block = copied.get_submodule(site.block)
            if site.path not in faults and type(block) in arguments:
                attempt(site, block, *arguments[type(block)])
    return faults, passed


def _make_hollow(edit: TensorEdit) -> list[torch.Tensor]:
    return [torch.empty(spec.shape, device="meta") for spec in edit.resolved]


def find_whole_fault(
    model: PreTrainedModel,
    changes: Sequence[SiteChange],
    attributes: Attributes,
    patch: Mapping[str, Any],
    mask: bool,
) -> str:
    """Find what the model raises on the meta device with all its changes; "" if it runs.

    Each block may run with its new heads, and still return what others cannot use.

    Args:
        mask: whether the model gets an attention mask.
    """
    copied = make_meta_copy(model)
    for spec in (spec for change in changes for edit in change.edits for spec in edit.results):
        path, _, name = spec.name.rpartition(".")
        hollow = torch.empty(spec.shape, device="meta", dtype=model.dtype)
        setattr(copied.get_submodule(path), name, nn.Parameter(hollow))
    set_attributes(copied, attributes)
    cross = any(change.before.cross for change in changes)
    try:
        with sharing_kv(copied, True), torch.no_grad(), patching_config(copied.config, patch):
            copied(**make_probe_inputs(copied, cross=cross, mask=mask))
    except FAULTS as error:
        return get_first_line(error)
    return ""


def _find_misreadings(
    block: nn.Module,
    site: Site,
    edits: Sequence[TensorEdit],
    guesses: Sequence[Attributes],
    faults: Mapping[int, str],
    patching: Callable[[], AbstractContextManager[None]],
    args: Any,
    kwargs: Any,
) -> dict[int, str]:
    """Find the guesses with which a block runs, but takes its heads for others.

    Only a projection packed in several blocks can be misread so: elsewhere a wrong width fits
    nothing. Shapes do not show it, so the block runs on the CPU with random values, the changed
    one and its equivalent, as in the equivalence check. The block is on the meta device again
    afterwards.

    Returns:
        Number of the guess → what is wrong; nothing if every guess is wrong, or none can be run.
    """
    packing = site.query.packing
    left = [number for number in range(len(guesses)) if number not in faults]
    if packing is None or packing.grouped or packing.blocks == 1 or len(left) < 2:
        return {}
    generator = torch.Generator().manual_seed(0)

    def fill(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_floating_point():
            return torch.ones(value.shape, dtype=value.dtype)
        return torch.randn(value.shape, generator=generator).to(value.dtype)

    def draw_inputs(edit: TensorEdit) -> list[torch.Tensor]:
        return [torch.randn(spec.shape, generator=generator) for spec in edit.resolved]

    block.to_empty(device="cpu")
    try:
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data.copy_(fill(tensor) / max(1, tensor.shape[-1]) ** 0.5)
        args, kwargs = tree_map(fill, (args, kwargs))
        narrow, wide = make_site_tensors(block, site, edits, draw_inputs)
        expected = run_block(block, wide, args, kwargs)
        wrong = {}
        for number in left:
            with setting_block_attributes(block, site, guesses[number]), patching():
                distance = compute_relative_distance(
                    run_block(block, narrow, args, kwargs), expected
                )
            if not distance <= choose_tolerance(block):
                wrong[number] = f"its output would be off by {distance:.2g} of its size"
    except FAULTS:
        return {}  # the equivalence check decides, on the model's own values
    finally:
        block.to("meta")
    return wrong if len(wrong) < len(left) else {}


def _find_fault(
    number: int, block: nn.Module, tensors: Any, args: Any, kwargs: Any, expected: torch.Size
) -> dict[int, str]:
    try:
        shape = run_block(block, tensors, args, kwargs).shape
    except FAULTS as error:
        return {number: get_first_line(error)}
    return {} if shape == expected else {number: f"its output would be {list(shape)}"}
