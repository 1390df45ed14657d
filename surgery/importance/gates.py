"""Gates on heads: multiply what each head gives to the output projection by a number."""

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

    With a gate of 0 the model computes as if it did not have the head; with a gate of 1 nothing
    changes. A site whose module is called several times (ALBERT's layers) is gated each time.

    Args:
        model: the model that has the sites.
        sites: the sites that may be gated.
        gates: site path → [Hq], or [B, Hq] with one row of gates per row of the batch. Sites
            without an entry stay as they are.

    Attributes:
        gates: every forward pass looks here, so it may be changed while open.
        calls: how often the output projection of each site was called, gated or not.
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
        """Check that the gates had an effect.

        Raises:
            SurgeryError: the output projection of a site was never called as a module.
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
            return (apply_gate(args[0], gate, self.site), *args[1:]), kwargs
        name, inputs = next(iter(kwargs.items()))
        return args, {**kwargs, name: apply_gate(inputs, gate, self.site)}


def apply_gate(inputs: torch.Tensor, gate: torch.Tensor, site: Site) -> torch.Tensor:
    """Multiply every head's slice by its gate.

    Args:
        inputs: [B, N, Hq * unit] or [B * N, Hq * unit].
        gate: [Hq] or [B, Hq].
    """
    gate = gate.to(inputs.dtype)
    rows = gate.shape[0] if gate.ndim == 2 else 1
    heads = inputs.reshape(rows, -1, site.q_heads, site.output.unit)
    return (heads * gate.reshape(rows, 1, site.q_heads, 1)).reshape(inputs.shape)
