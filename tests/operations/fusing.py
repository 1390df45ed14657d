"""What to fuse: the projections of models, and a block that can be called in odd ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NAMES = ("q_proj", "k_proj", "v_proj")


def places(model: nn.Module) -> list[dict[str, str]]:
    """Every block with three projections, as `fuse_qkv_` is told of them."""
    return [
        {"path": path}
        | {
            role: f"{path}.{name}"
            for role, name in zip(("query", "key", "value"), _NAMES, strict=True)
        }
        for path, module in model.named_modules()
        if all(hasattr(module, name) for name in _NAMES)
    ]


class Attention(nn.Module):
    """Returns what its projections return; no attention is needed to see whether they are right."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        *,
        order: str = "",
        write: bool = False,
        fail: bool = False,
        no_grad_first: bool = False,
        within: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if order:
            return tuple(getattr(self, name)(x) for name in order)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not no_grad_first):
            q = self.q(x)
        if write:
            x.mul_(2)
        if fail:
            raise ValueError("midway")
        inner = self(within) if within is not None else ()
        k = self.k(x if y is None else y)
        v = self.v(x if y is None else y if z is None else z)
        return q, k, v, *inner


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)

    @staticmethod
    def place() -> dict[str, str]:
        return {"path": "attn", "query": "attn.q", "key": "attn.k", "value": "attn.v"}
