"""Gates on heads: what each head hands to the output projection, times a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from surgery.errors import SurgeryError
from surgery.models.sites import Site


class Gates:
    """While open, multiplies every head's slice of an output projection's input by its gate.

    At gates of 0 a head's output is that of a model without it; at 1, of the model as it is. A
    site whose module is called several times (ALBERT's layers) is gated each time.

    Args:
        model: that has the sites.
        sites: those that may be gated.
        gates: site path → [Hq], or [B, Hq] with a row of gates per row of the batch. Sites without
            an entry are left as they are. May be changed while open: see `gates`.

    Attributes:
        gates: the mapping that every forward pass looks up.
        calls: how often each site's output projection was called, gated or not.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        gates: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self.sites = tuple(sites)
        self.gates: dict[str, torch.Tensor] = dict(gates or {})
        self.calls: dict[str, int] = {site.path: 0 for site in sites}
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        if self._handles:
            return
        for site in self.sites:
            module = self.model.get_submodule(site.output.path)
            hook = _Hook(self, site)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Gates:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require_calls(self) -> None:
        """Refuse to go on blind.

        Raises:
            SurgeryError: a site's output projection was never called as a module.
        """
        for path, calls in self.calls.items():
            if not calls:
                raise SurgeryError(
                    f"{path} took no part in a forward pass over these batches, or does not call "
                    "its output projection, so its heads cannot be gated"
                )


class _Hook:
    def __init__(self, gates: Gates, site: Site) -> None:
        self.gates, self.site = gates, site

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.gates.calls[self.site.path] += 1
        gate = self.gates.gates.get(self.site.path)
        if gate is None:
            return None
        if args:
            return (gated(args[0], gate, self.site), *args[1:]), kwargs
        name, inputs = next(iter(kwargs.items()))
        return args, {**kwargs, name: gated(inputs, gate, self.site)}


def gated(inputs: torch.Tensor, gate: torch.Tensor, site: Site) -> torch.Tensor:
    """[B, N, Hq * unit] (or [B * N, Hq * unit]) with every head's slice times its gate.

    Args:
        gate: [Hq] or [B, Hq].
    """
    gate = gate.to(inputs.dtype)
    rows = gate.shape[0] if gate.ndim == 2 else 1
    heads = inputs.reshape(rows, -1, site.q_heads, site.output.unit)
    return (heads * gate.reshape(rows, 1, site.q_heads, 1)).reshape(inputs.shape)
