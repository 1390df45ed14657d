"""The equivalence check: does each changed site compute what it should?

The changed site must give the same output as the old site in which each merged head replaces every
member of its group, and removed heads are not read. Both run on the inputs that the site gets from
the model, with other tensors only for this run. This finds a forward that pairs heads in its own
way, or that holds a head count which nobody updated. The model is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call
from transformers import Cache, PreTrainedModel

from surgery.errors import PlanError, get_first_line
from surgery.models.attributes import setting_attributes
from surgery.models.config import patching_config
from surgery.models.forward import evaluating
from surgery.models.lists import growing_lists
from surgery.models.probe import list_input_names, make_probe_inputs
from surgery.models.share_kv import sharing_kv
from surgery.models.sites import Site, get_text_config
from surgery.transforms import run_equivalent, run_transform
from surgery.transforms.edits import SiteChange, TensorEdit

TF32_EPS = 2.0**-10
# What a forward raises for shapes that it cannot use; the errors have no common class.
FAULTS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
)

Tensors = dict[str, torch.Tensor]
# Gets the block of a site and the arguments with which it was called.
Visit = Callable[[nn.Module, Any, Any], None]


class PlannedChanges(Protocol):
    """The parts of a `surgery.plan.plan.Plan` that are checked."""

    @property
    def before(self) -> tuple[Site, ...]: ...
    @property
    def changes(self) -> tuple[SiteChange, ...]: ...
    @property
    def edits(self) -> list[TensorEdit]: ...
    @property
    def head_attributes(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def head_patch(self) -> Mapping[str, Any]: ...
    @property
    def shares_kv(self) -> bool: ...
    def get_inputs(self, edit: TensorEdit) -> list[torch.Tensor]: ...


def check_equivalence(
    model: PreTrainedModel, plan: PlannedChanges, probe: Mapping[str, Any] | None = None
) -> None:
    """Check every changed site of `plan` in one forward pass over a few tokens.

    Args:
        probe: arguments for that pass, for models that need more than token ids or pixels.

    Raises:
        PlanError: a changed site computes something else, or did not run.
    """
    edits = group_edits_by_site(plan.changes)
    sites = {site.path: site for site in plan.before if site.path in edits}
    differences: dict[str, float] = {}

    def visit(site: Site) -> Visit:
        def compare(block: nn.Module, args: Any, kwargs: Any) -> None:
            differences[site.path] = math.inf
            tensors = make_site_tensors(block, site, edits[site.path], plan.get_inputs)
            with (
                setting_block_attributes(block, site, plan.head_attributes),
                patching_config(model.config, patch),
            ):
                changed = run_block(block, tensors[0], args, kwargs)
            # Last, so that values that later sites read from this one have the shape they expect.
            differences[site.path] = compute_relative_distance(
                changed, run_block(block, tensors[1], args, kwargs)
            )

        return compare

    patch = plan.head_patch
    what = "the model"
    try:
        with (
            evaluating(model),
            avoiding_flash_on_cpu(model),
            sharing_kv(model, plan.shares_kv),
            torch.no_grad(),
        ):
            visit_sites(model, sites.values(), visit, probe=probe)
            if _reaches_further(plan):
                what = "the model with its new heads"
                _run_whole(model, plan, patch, probe)
    except FAULTS as error:
        failed = [f"{path} with its new heads" for path, d in differences.items() if d == math.inf]
        what = failed[0] if failed else what
        if what == "the model" and probe is None:
            raise PlanError(_explain_inputs(model)) from error
        raise PlanError(f"{what} cannot be run: {get_first_line(error)}") from error
    for path, site in sites.items():
        if path not in differences:
            raise PlanError(
                f"{path} took no part in a forward pass, so it cannot be checked"
                + ("" if probe is not None else "; give `apply_` inputs that reach it, as probe=")
            )
        if not differences[path] <= choose_tolerance(model.get_submodule(site.block)):
            raise PlanError(
                f"{path} does not use its heads as planned: with the new ones its output is "
                f"off by {differences[path]:.2g} of its size"
            )


def _explain_inputs(model: PreTrainedModel) -> str:
    names = ", ".join(list_input_names(model))
    return (
        f"the model cannot be run on inputs made from its config: a {type(model).__name__} needs "
        f"others than these ({names}); give them to `apply_` as probe={{name: tensor}}"
    )


def _reaches_further(plan: PlannedChanges) -> bool:
    """Whether a tensor outside projections and norms changes, which may affect other modules."""
    for change in plan.changes:
        site = change.before
        known = (site.query, site.key, site.value, site.output, site.q_norm, site.k_norm)
        own = tuple(f"{part.path}." for part in known if part is not None)
        names = [spec.name for edit in change.edits for spec in edit.results]
        if any(not name.startswith(own) for name in names):
            return True
    return False


def _run_whole(
    model: PreTrainedModel,
    plan: PlannedChanges,
    patch: Mapping[str, Any],
    probe: Mapping[str, Any] | None,
) -> None:
    tensors: Tensors = {}
    for edit in plan.edits:
        sources = [tensors.get(s.name, model.get_parameter(s.name)).detach() for s in edit.sources]
        results = run_transform(edit.transform, [*sources, *plan.get_inputs(edit)], edit.arguments)
        tensors |= {spec.name: tensor for spec, tensor in zip(edit.results, results, strict=True)}
    inputs = probe or make_probe_inputs(model, cross=any(site.cross for site in plan.before))
    with setting_attributes(model, plan.head_attributes), patching_config(model.config, patch):
        functional_call(model, tensors, kwargs=dict(inputs), strict=False)


def group_edits_by_site(changes: Sequence[SiteChange]) -> dict[str, list[TensorEdit]]:
    """Group tensor edits by the path of their site, in order."""
    edits: dict[str, list[TensorEdit]] = {}
    for change in changes:
        edits.setdefault(change.before.path, []).extend(change.edits)
    return edits


def visit_sites(
    model: PreTrainedModel,
    sites: Iterable[Site],
    visit: Callable[[Site], Visit],
    *,
    mask: bool = False,
    probe: Mapping[str, Any] | None = None,
) -> None:
    """Run `model` once, and visit the block of each site the first time that it is called.

    Args:
        mask: whether to give the model an attention mask.
        probe: arguments of the forward pass, instead of a few tokens.
    """
    sites = list(sites)
    visited: set[str] = set()
    if probe is None:
        probe = make_probe_inputs(model, cross=any(site.cross for site in sites), mask=mask)

    def hook(site: Site) -> Any:
        visit_block = visit(site)

        def call(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if site.path not in visited:  # this also ends the recursion of the visitor's own calls
                visited.add(site.path)
                # Some models always use a cache; every call must start without one.
                args = tuple(None if isinstance(value, Cache) else value for value in args)
                kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
                visit_block(block, args, kwargs)

        return call

    handles = [
        model.get_submodule(site.block).register_forward_hook(hook(site), with_kwargs=True)
        for site in sites
    ]
    try:
        model(**probe)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def setting_block_attributes(
    block: nn.Module, site: Site, attributes: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """Set those attributes of a plan that lie in `site`'s block, and restore them after it."""
    within = {
        name[len(site.block) :].lstrip("."): values
        for name, values in attributes.items()
        if name == site.block or name.startswith(f"{site.block}.") or not site.block
    }
    with setting_attributes(block, within):
        yield


def run_block(block: nn.Module, tensors: Tensors, args: Any, kwargs: Any) -> torch.Tensor:
    """Run a block with other tensors and return its (first) output."""
    with growing_lists(block, tensors):
        output = functional_call(block, tensors, args, kwargs)
    while isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{type(block).__name__} returns {type(output).__name__}, not a tensor")
    return output


def make_site_tensors(
    block: nn.Module,
    site: Site,
    edits: Sequence[TensorEdit],
    inputs: Callable[[TensorEdit], list[torch.Tensor]],
) -> tuple[Tensors, Tensors]:
    """Make the new parameters of a block, and equivalent ones in the old shapes; local names.

    Args:
        inputs: returns the calibrated tensors that an edit uses besides its sources.
    """
    prefix = f"{site.block}." if site.block else ""
    new = {f"{prefix}{name}": p.detach() for name, p in block.named_parameters()}
    stages = []
    for edit in edits:
        stages.append([new[spec.name] for spec in edit.sources])
        tensors = [*stages[-1], *inputs(edit)]
        results = run_transform(edit.transform, tensors, edit.arguments)
        new |= {spec.name: tensor for spec, tensor in zip(edit.results, results, strict=True)}
        for name in edit.dropped:
            del new[name]
    old = dict(new)
    for edit, sources in zip(reversed(edits), reversed(stages), strict=True):
        results = [old[spec.name] for spec in edit.results]
        wide = run_equivalent(edit.transform, results, sources, edit.arguments)
        old |= {spec.name: tensor for spec, tensor in zip(edit.sources, wide, strict=True)}
    return (
        {name[len(prefix) :]: tensor for name, tensor in new.items()},
        {name[len(prefix) :]: tensor for name, tensor in old.items()},
    )


def compute_relative_distance(changed: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what is expected."""
    size = expected.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((changed - expected).float().norm() / size)


def choose_tolerance(module: nn.Module) -> float:
    """Choose a tolerance: a wrong head is off by about 1, rounding by far less than sqrt(eps)."""
    parameter = next(module.parameters())
    # Even fp64 models compute norms and softmax in fp32.
    eps = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)
    if parameter.is_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, TF32_EPS)
    return math.sqrt(eps)


@contextmanager
def avoiding_flash_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Use eager instead of flash attention on a CPU, where models are changed before training."""
    text = get_text_config(model.config)
    implementation = text._attn_implementation
    if model.device.type != "cpu" or "flash" not in str(implementation):
        yield
        return
    text._attn_implementation = "eager"
    try:
        yield
    finally:
        text._attn_implementation = implementation
