"""Find what stands in the way of editing a model: wrapped, computed, quantized or absent weights.

Surgery replaces parameters. So every projection must be a plain `nn.Linear` or Conv1D that holds
its own parameters, with values where the model is not wholly on the meta device. What is in the way
is recognised by its structure, and comes with a remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from surgery.errors import ConfigError
from surgery.models.own_record import is_own_record
from surgery.models.reference import ReferenceModels
from surgery.models.sites import ROLES, Anatomy, Site, find_sites
from surgery.models.sites.read import name_class

PLAIN = "plain Linear or Conv1D projections, each with its own parameters"
WHOLE = "load the whole model into memory, without a device_map that offloads"
# In these weights are computed with; all others store them in a compressed form.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What wraps a module and holds it under this name (PEFT's adapters and trained copies).
_ADAPTED = ("base_layer", "original_module")
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way.

    Attributes:
        problem: a sentence that names the module.
        given: what the module is, and where.
        remedy: what to do.
    """

    problem: str
    given: str
    remedy: str


def check_model(model: nn.Module) -> None:
    """Check that `model` has a config of transformers, from which its attention can be read.

    Raises:
        ConfigError: it has none.
    """
    obstacle = _find_foreign(model)
    if obstacle is not None:
        raise _make_error("model", obstacle)


def check_editable(model: nn.Module, *, converts: bool = False) -> None:
    """Check that the weights of `model` can be edited; see the module's docstring.

    Args:
        converts: whether it is converted first, which refuses a quantized config in its own words.

    Raises:
        ConfigError: they cannot.
    """
    obstacle = find_obstacle(model, converts=converts)
    if obstacle is not None:
        raise _make_error("attention", obstacle)


def check_values(model: nn.Module) -> None:
    """Check that `model` can run over data: every weight has values, at least while it runs.

    Raises:
        ConfigError: it is not a model of transformers, or weights are on the meta device.
    """
    check_model(model)
    # A hook can also serve the modules inside its own.
    offloaded = [path for path, module in model.named_modules() if _is_offloaded(module)]
    served = tuple(f"{path}." if path else "" for path in offloaded)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not name.startswith(served):
            problem = f"{name} is on the meta device, so it has no values"
            kind = type(model).__name__
            raise ConfigError("model", problem, given=kind, valid="a model with its weights")


def _make_error(key: str, obstacle: Obstacle) -> ConfigError:
    return ConfigError(key, obstacle.problem, given=obstacle.given, valid=obstacle.remedy)


def find_obstacle(model: nn.Module, *, converts: bool = False) -> Obstacle | None:
    """Find the first thing that stands in the way of editing the attention of `model`."""
    foreign = _find_foreign(model)
    if foreign is not None:
        return foreign
    if not isinstance(model, PreTrainedModel):
        return _explain_wrapped_model(model)
    quantized = None if converts else _find_quantized(model)
    return quantized or _find_absent(model) or _find_in_blocks(model, find_sites(model))


def _find_foreign(model: nn.Module) -> Obstacle | None:
    """Refuse what has no config of transformers, so that nothing is known of its attention."""
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        return None
    return _explain_wrapped_model(model)


def _explain_wrapped_model(model: nn.Module) -> Obstacle:
    kind, remedy = type(model).__name__, "a PreTrainedModel"
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            remedy = f"the model inside it, .{path}"
            break
    adapted = any(hasattr(module, name) for module in model.modules() for name in _ADAPTED)
    if adapted:
        remedy = "the model with its adapter merged, .merge_and_unload(), or add it after surgery"
    return Obstacle(f"{kind} is not a model of transformers itself", kind, remedy)


def _find_quantized(model: PreTrainedModel) -> Obstacle | None:
    stored = getattr(model.config, "quantization_config", None)
    if stored is None or is_own_record(stored):
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    problem, remedy = "quantized weights cannot be operated on", "the model's unquantized original"
    return Obstacle(problem, str(getattr(method, "value", method)), remedy)


def _find_absent(model: PreTrainedModel) -> Obstacle | None:
    """Find weights that are offloaded, or are the only ones without values."""
    hollow = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if not hollow:
        return None
    for path, module in model.named_modules():
        if _is_offloaded(module):
            name, place = path or "the model", _find_place(model, path)
            problem = f"{name} is offloaded: its weights are in place only while it runs"
            return Obstacle(problem, f"{type(module).__name__}{place}", WHOLE)
    if len(hollow) == sum(1 for _ in model.parameters()) or _is_built_so(model, hollow):
        return None
    remedy = f"{WHOLE}; or the whole model on the meta device, to plan only"
    problem = f"{hollow[0]} is on the meta device, so it has no values, but other weights have"
    return Obstacle(problem, type(model).__name__, remedy)


def _is_built_so(model: PreTrainedModel, hollow: Sequence[str]) -> bool:
    """Whether building on the meta device also gives these weights, and only these, no values."""
    try:
        reference = ReferenceModels(model).get({})
    except ConfigError:
        return False
    return {name for name, p in reference.named_parameters() if p.is_meta} == set(hollow)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate puts the module's weights in place only while it runs."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(one, "weights_map", None) is not None for one in hooks)


def _find_place(model: nn.Module, path: str) -> str:
    places = getattr(model, "hf_device_map", {})
    while path and path not in places:
        path = path.rpartition(".")[0]
    return f", device_map: {places[path]}" if path in places else ""


def _find_in_blocks(model: PreTrainedModel, anatomy: Anatomy) -> Obstacle | None:
    readable = {site.block: site.path for site in anatomy.sites}
    unreadable = [block.path for block in anatomy.unreadable]
    for block, path in chain(readable.items(), zip(unreadable, unreadable, strict=True)):
        where = f"{path} ({type(model.get_submodule(path)).__name__})"
        modules = list(model.get_submodule(block).named_modules(prefix=block))
        for explain in (_explain_computed, _explain_tensors):
            for name, module in modules:
                explained = explain(module)
                if explained is not None:
                    given = f"{name_class(module)} in {where}"
                    return Obstacle(f"{name} {explained[0]}", given, explained[1])
    references = ReferenceModels(model)
    for path in unreadable:
        obstacle = _find_replaced(model, path, references)
        if obstacle is not None:
            return obstacle
    for site in anatomy.sites:
        obstacle = _find_in_site(model, site, references)
        if obstacle is not None:
            return obstacle
    return _find_one_for_two(model, anatomy.sites)


def _explain_computed(module: nn.Module) -> tuple[str, str] | None:
    """Explain a module whose weights are computed from other tensors, or that wraps another."""
    for name in _ADAPTED:
        if isinstance(getattr(module, name, None), nn.Module):
            return (
                f"is a {name_class(module)}, an adapter around its {name}",
                "merge it into the weights first (PEFT: merge_and_unload()), or add it afterwards",
            )
    if parametrize.is_parametrized(module):
        (tensor, several), *_ = module.parametrizations.items()  # type: ignore[union-attr,operator]
        kinds = ", ".join(type(one).__name__.lstrip("_") for one in several)
        return (
            f"computes its {tensor} (parametrization {kinds})",
            f'torch.nn.utils.parametrize.remove_parametrizations(module, "{tensor}") first',
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            tensor = hook._tensor_name
            return (
                f"computes its {tensor} from {tensor}_orig and {tensor}_mask",
                f'torch.nn.utils.prune.remove(module, "{tensor}") first',
            )
        if isinstance(hook, WeightNorm):
            return (
                f"computes its {hook.name} from {hook.name}_g and {hook.name}_v",
                f'torch.nn.utils.remove_weight_norm(module, "{hook.name}") first',
            )
        if isinstance(hook, SpectralNorm):
            return (
                f"computes its {hook.name} from {hook.name}_orig (spectral norm)",
                f'torch.nn.utils.remove_spectral_norm(module, "{hook.name}") first',
            )
    return None


def _explain_tensors(module: nn.Module) -> tuple[str, str] | None:
    """Explain a parameter that is not a plain tensor of floating-point numbers."""
    for name, parameter in module.named_parameters(recurse=False):
        kind = type(parameter)
        plain = kind is nn.Parameter and type(parameter.data) is torch.Tensor
        if not plain and hasattr(parameter, "device_mesh"):
            return f"has a {name} of type {kind.__name__}", "operate before the model is sharded"
        if not plain:
            return (
                f"has a {name} of type {kind.__name__}, not a plain Parameter",
                "weights that are not quantized: quantize them after surgery",
            )
        if parameter.dtype not in _DTYPES:
            return (
                f"has a {name} that is stored as {parameter.dtype}",
                "weights that are not quantized: quantize them after surgery",
            )
    return None


def _find_in_site(
    model: PreTrainedModel, site: Site, references: ReferenceModels
) -> Obstacle | None:
    where = f"{site.path} ({type(model.get_submodule(site.path)).__name__})"
    for path in _iterate_projections(site):
        module: nn.Module = model.get_submodule(path)
        kind = type(module).__name__
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            problem = f"{path} is a {kind}, which holds no weight of its own"
            return Obstacle(problem, where, str(getattr(module, "remedy", PLAIN)))
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            problem = f"{path} has a forward that was put in the place of its own"
            return Obstacle(problem, f"{kind} in {where}", 'delattr(module, "forward") first')
        if not is_plain(module) and not _is_its_own(path, module, references):
            more = ", ".join(sorted(_list_tensors(module) - {"weight", "bias"}))
            why = f"it also holds {more}" if more else "it has a forward of its own"
            problem = f"{path} is a {name_class(module)}, not a plain Linear: {why}"
            return Obstacle(problem, where, PLAIN)
    return None


def _find_replaced(
    model: PreTrainedModel, path: str, references: ReferenceModels
) -> Obstacle | None:
    """Find a part of a block where the architecture itself has a plain Linear or Conv1D."""
    try:
        original = references.get({}).get_submodule(path)
    except (ConfigError, AttributeError):
        return None
    block = model.get_submodule(path)
    for name, module in original.named_children():
        there = getattr(block, name, None)
        wrapped = isinstance(there, nn.Module) and type(there) is not type(module)
        if type(module) in (nn.Linear, Conv1D) and wrapped:
            kind = type(module).__name__
            problem = f"{path}.{name} is a {name_class(there)}, where the architecture has a {kind}"
            return Obstacle(problem, f"{path} ({type(block).__name__})", PLAIN)
    return None


def _iterate_projections(site: Site) -> Iterator[str]:
    """Yield the paths of the projections; a path once, if all roles are packed in one."""
    yield from dict.fromkeys(site.get_projection(role).path for role in (*ROLES, "output"))


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a Linear or Conv1D, with nothing besides its own weight and bias."""
    own = isinstance(module._parameters.get("weight"), nn.Parameter)
    usual = type(module).forward in _PLAIN_FORWARDS
    return own and usual and _list_tensors(module) <= {"weight", "bias"}


def _list_tensors(module: nn.Module) -> set[str]:
    return {name for name, _ in chain(module.named_parameters(), module.named_buffers())}


def _is_its_own(path: str, module: nn.Module, references: ReferenceModels) -> bool:
    """Whether the architecture itself builds the module so (FalconLinear)."""
    try:
        original = references.get({}).get_submodule(path)
    except (ConfigError, AttributeError):
        return False
    return type(original) is type(module) and _list_tensors(original) == _list_tensors(module)


def _find_one_for_two(model: PreTrainedModel, sites: tuple[Site, ...]) -> Obstacle | None:
    """Find a projection that is the same module at two places: it cannot differ between them."""
    owners: dict[int, str] = {}
    for site in sites:
        for path in _iterate_projections(site):
            other = owners.setdefault(id(model.get_submodule(path)), path)
            if other != path:
                kind = type(model.get_submodule(site.path)).__name__
                remedy = "a module for each: copy.deepcopy one of them"
                problem = f"{path} is the same module as {other}"
                return Obstacle(problem, f"{site.path} ({kind})", remedy)
    return None
