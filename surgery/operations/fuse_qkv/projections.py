"""Query, key and value projections as one matrix product, in a live model of any architecture.

The three modules stay where the model's code looks for them, but as `FusedPart`: they hold no
weights and share one `qkv_proj`. The first of them to be called in a pass of the attention block
runs the product, the others return their part of it. No forward is rewritten, and
`unfuse_qkv_` brings back three Linears with the same bits, so an export is native.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from surgery.errors import PlanError

FUSED = "qkv_proj"
ROLES = ("query", "key", "value")

# What else a result depends on, besides the input and the weights.
_Key = tuple[int | None, bool, bool]


class _BlockPass:
    """The outputs not yet returned in one pass of the block."""

    def __init__(self) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        self.input: torch.Tensor | None = None
        self.key: _Key | None = None


class SharedOutputs:
    """What the three parts of one block share.

    Results are kept only while the block runs, whether it returns or raises, and only for the very
    tensor they were computed from. Anything else (another input, a part called twice or from
    outside the block) is computed from that part's rows of the weight.

    Attributes:
        holder: the module with the parts and the fused projection.
        sizes: output features of query, key and value.
    """

    def __init__(self, holder: nn.Module, sizes: Sequence[int]) -> None:
        self.holder = holder
        self.sizes = tuple(sizes)
        self._passes: list[_BlockPass] = []

    def open(self, module: nn.Module, args: Any) -> None:
        """Run as forward pre-hook of the block. A block may call itself, so passes are a stack."""
        self._passes.append(_BlockPass())

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Run as forward hook of the block, after exceptions too."""
        if self._passes:
            self._passes.pop()

    def get_fused(self) -> nn.Module:
        """Get the fused projection by its name, so that whatever wraps it is called."""
        return self.holder.get_submodule(FUSED)

    def get_rows(self, tensor: torch.Tensor, part: int) -> torch.Tensor:
        """Get the part's rows of a fused weight or bias, as a view."""
        return tensor.narrow(0, sum(self.sizes[:part]), self.sizes[part])

    def take(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """Map [..., in] to the part's [..., out]."""
        if not self._passes:
            return self._compute_alone(x, part)
        current, key = self._passes[-1], _make_key(x)
        if not current.outputs:
            whole = self.get_fused()(x)
            current.outputs = {i: self._slice_output(whole, i) for i in range(3) if i != part}
            current.input, current.key = x, key
            return self._slice_output(whole, part)
        if part not in current.outputs or current.input is not x or current.key != key:
            return self._compute_alone(x, part)
        output = current.outputs.pop(part)
        if not current.outputs:
            current.input = None
        return output

    def _slice_output(self, whole: torch.Tensor, part: int) -> torch.Tensor:
        return whole.narrow(-1, sum(self.sizes[:part]), self.sizes[part])

    def _compute_alone(self, x: torch.Tensor, part: int) -> torch.Tensor:
        fused = self.get_fused()
        if type(fused) is not nn.Linear:  # wrapped since: only a call does what it should
            return self._slice_output(fused(x), part)
        bias = None if fused.bias is None else self.get_rows(fused.bias, part)
        return functional.linear(x, self.get_rows(fused.weight, part), bias)


def _make_key(x: torch.Tensor) -> _Key:
    # Tensors count no versions in inference mode, nor in a graph that is being compiled: there we
    # rely on a block not writing to its input between its projections.
    uncounted = torch.compiler.is_compiling() or x.is_inference()
    version = None if uncounted else x._version
    return version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)


class FusedPart(nn.Module):
    """Stands where a projection stood. Holds no parameters; shows those of its share as views."""

    remedy = "surgery.unfuse_qkv_(model) first"  # for code that needs separate weights

    def __init__(self, shared: SharedOutputs, part: int, in_features: int) -> None:
        super().__init__()
        self.shared = shared
        self.part = part
        self.in_features = in_features
        self.out_features = shared.sizes[part]

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], a view of the fused weight."""
        weight = self.shared.get_fused().weight
        assert isinstance(weight, torch.Tensor)
        return self.shared.get_rows(weight, self.part)

    @property
    def bias(self) -> torch.Tensor | None:
        """[out_features], a view of the fused bias."""
        bias = self.shared.get_fused().bias
        return self.shared.get_rows(bias, self.part) if isinstance(bias, torch.Tensor) else None

    def get_parameter_holder(self) -> nn.Module:
        """Get the module whose parameters these are a part of."""
        return self.shared.get_fused()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.take(x, self.part)

    def extra_repr(self) -> str:
        return (
            f"{ROLES[self.part]} of {FUSED}, in_features={self.in_features}, "
            f"out_features={self.out_features}"
        )


def fuse_qkv_(model: PreTrainedModel, sites: Sequence[Mapping[str, str]]) -> None:
    """Fuse the projections of some sites, in place. Sites that are fused already stay as they are.

    Args:
        sites: per site the module paths ``path`` (the block), ``query``, ``key`` and ``value``:
            three plain Linears of one module.

    Raises:
        PlanError: they are not, or cannot be one matrix. No site is changed then.
    """
    todo = [site for site in sites if not _is_site_fused(model, site)]
    owners = _count_owners(model)
    for site in todo:
        _check(model, site, owners)
    for site in todo:
        _fuse(model, site)


def unfuse_qkv_(model: nn.Module) -> None:
    """Put three Linears in place of every fused projection, with the same bits.

    Raises:
        PlanError: something else was put in the place of a part or of the fused projection.
    """
    found = list(_iterate_fused_holders(model))
    for path, names in found:
        holder = model.get_submodule(path)
        whole = type(getattr(holder, FUSED, None)) is nn.Linear
        if len(names) != 3 or not whole:
            raise PlanError(f"{path}: its {FUSED} was changed since it was fused")
    for path, names in found:
        _unfuse(model, path, names)


def is_fused(model: nn.Module) -> bool:
    """Whether any projection of the model is a part of a fused one."""
    return any(isinstance(module, FusedPart) for module in model.modules())


def _fuse(model: nn.Module, site: Mapping[str, str]) -> None:
    path, names = _locate_parts(site)
    holder = model.get_submodule(path)
    linears = [holder.get_submodule(name) for name in names]
    shared = SharedOutputs(holder, [int(linear.out_features) for linear in linears])  # type: ignore
    fused = _make_linear([linear.weight for linear in linears], [linear.bias for linear in linears])
    fused.train(linears[0].training)
    for part, name in enumerate(names):
        setattr(holder, name, FusedPart(shared, part, fused.in_features).train(fused.training))
    setattr(holder, FUSED, fused)
    block = model.get_submodule(site["path"])
    block.register_forward_pre_hook(shared.open)
    block.register_forward_hook(shared.close, always_call=True)


def _unfuse(model: nn.Module, path: str, names: Sequence[str]) -> None:
    holder = model.get_submodule(path)
    fused: Any = getattr(holder, FUSED)
    part: Any = getattr(holder, names[0])
    shared: SharedOutputs = part.shared
    for part_number, name in enumerate(names):
        linear = _make_linear(
            [_copy_rows(fused.weight, shared, part_number)],
            [_copy_rows(fused.bias, shared, part_number)],
        )
        setattr(holder, name, linear.train(fused.training))
    delattr(holder, FUSED)
    for module in model.modules():
        _remove_hooks(module, shared)


def _copy_rows(
    parameter: nn.Parameter | None, shared: SharedOutputs, part: int
) -> nn.Parameter | None:
    if parameter is None:
        return None
    rows = nn.Parameter(shared.get_rows(parameter.detach(), part), parameter.requires_grad)
    if parameter.grad is not None:
        rows.grad = shared.get_rows(parameter.grad, part)
    return rows


def _make_linear(weights: Sequence[Any], biases: Sequence[Any]) -> nn.Linear:
    """Make a Linear with the rows of all weights; it shares none of their memory."""
    rows = sum(int(weight.shape[0]) for weight in weights)
    linear = nn.Linear(weights[0].shape[1], rows, bias=biases[0] is not None, device="meta")
    linear.weight = _stack_parameters(weights)
    if biases[0] is not None:
        linear.bias = _stack_parameters(biases)
    return linear


def _stack_parameters(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    whole = torch.cat([parameter.detach() for parameter in parameters])
    stacked = nn.Parameter(whole, requires_grad=parameters[0].requires_grad)
    if any(parameter.grad is not None for parameter in parameters):
        stacked.grad = torch.cat(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        )
    return stacked


def _remove_hooks(module: nn.Module, shared: SharedOutputs) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        ours = [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is shared]
        for number in ours:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def _iterate_fused_holders(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield modules with parts: path, and the parts' names in the order query, key, value."""
    for path, module in model.named_modules():
        parts = [(m.part, name) for name, m in module.named_children() if isinstance(m, FusedPart)]
        if parts:
            yield path, [name for _, name in sorted(parts)]


def _locate_parts(site: Mapping[str, str]) -> tuple[str, list[str]]:
    """Find the module that holds the three projections, and their names in it."""
    places = [site[role].rpartition(".") for role in ROLES]
    if len({path for path, _, _ in places}) > 1:
        raise PlanError(f"{site['path']}: its projections are in different modules")
    return places[0][0], [name for _, _, name in places]


def _is_site_fused(model: nn.Module, site: Mapping[str, str]) -> bool:
    path, names = _locate_parts(site)
    holder = model.get_submodule(path)
    children = [getattr(holder, name, None) for name in names]
    return all(isinstance(child, FusedPart) for child in children)


def _count_owners(model: nn.Module) -> dict[int, int]:
    """Count the places of the model that hold each parameter."""
    count: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _check(model: nn.Module, site: Mapping[str, str], owners: Mapping[int, int]) -> None:
    path, names = _locate_parts(site)
    holder = model.get_submodule(path)
    if hasattr(holder, FUSED):
        raise PlanError(f"{path} has a {FUSED} already")
    linears: list[nn.Linear] = []
    for name in names:
        child = getattr(holder, name, None)
        if type(child) is not nn.Linear:
            kind = type(child).__name__
            raise PlanError(f"{path}.{name} is a {kind}; only plain Linears can be fused")
        if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
            raise PlanError(f"{path}.{name} has hooks, which would be lost")
        linears.append(child)
    differing: dict[str, set[Any]] = {
        "inputs": {linear.in_features for linear in linears},
        "biases": {linear.bias is not None for linear in linears},
        "dtypes": {p.dtype for linear in linears for p in linear.parameters()},
        "devices": {p.device for linear in linears for p in linear.parameters()},
        "settings of requires_grad": {p.requires_grad for li in linears for p in li.parameters()},
    }
    for what, values in differing.items():
        if len(values) > 1:
            raise PlanError(f"{path}: its projections differ in their {what}")
    if any(owners[id(p)] > 1 for linear in linears for p in linear.parameters()):
        raise PlanError(f"{path}: its projections share weights with other modules")
