"""AdamW, or Muon with AdamW for what Muon is not meant for; warm-up, then a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgery.config.schema import OptimConfig, OptimizerName

Named = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(named: Named, cfg: OptimConfig) -> Optimizer:
    """Build the optimizer of `optim.*` over the trainable parameters."""
    assert cfg.lr is not None, "the run resolves a rate that was left open"
    trainable = [(name, p) for name, p in named if p.requires_grad]
    if cfg.name is OptimizerName.muon:
        return MuonWithAdamW(trainable, cfg)
    matrices = [p for _, p in trainable if p.ndim >= 2]
    others = [p for _, p in trainable if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=(cfg.betas[0], cfg.betas[1]),
    )


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings and vectors.

    One optimizer to the outside: learning-rate schedules reach both through `param_groups`.
    Muon's update is scaled to AdamW's root mean square (arXiv:2502.16982), so one learning rate
    serves both.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], cfg: OptimConfig) -> None:
        assert cfg.lr is not None
        hidden = [p for name, p in named if p.ndim == 2 and not _is_table(name)]
        others = [p for name, p in named if p.ndim != 2 or _is_table(name)]
        self._parts: list[Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=cfg.lr,
                    weight_decay=cfg.weight_decay,
                    momentum=cfg.betas[1],
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            betas = (cfg.betas[0], cfg.betas[1])
            self._parts.append(AdamW(others, lr=cfg.lr, betas=betas, weight_decay=0.0))
        super().__init__([{"params": hidden + others}], {"lr": cfg.lr})
        self._share_state()

    def _share_state(self) -> None:
        """Show the parts' own groups and state, so that an edit of them edits the parts."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state.clear()
        for part in self._parts:
            self.state.update(part.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
            self.state.update(part.state)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_state()


def _is_table(name: str) -> bool:
    """Whether a tensor is an embedding or output head: read by row, no matrix to Muon."""
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe", "score", "classifier"))


def make_warmup_cosine(optimizer: Optimizer, cfg: OptimConfig, total_steps: int | None) -> LambdaLR:
    """Rise linearly over `warmup_steps`, then fall by a half cosine to `final_lr_fraction`.

    Without a known end (`total_steps` ``None``) the rate stays constant after the warm-up.
    """

    def compute_factor(step: int) -> float:
        if step < cfg.warmup_steps:
            return (step + 1) / cfg.warmup_steps
        if total_steps is None or total_steps <= cfg.warmup_steps:
            return 1.0
        share = min(1.0, (step - cfg.warmup_steps) / (total_steps - cfg.warmup_steps))
        low = cfg.final_lr_fraction
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))

    return LambdaLR(optimizer, compute_factor)
