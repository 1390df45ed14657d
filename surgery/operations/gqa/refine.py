"""A few gradient steps on the coefficients of one site's merge, towards the original's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.view import KeptBatch
from surgery.models.sites import Site
from surgery.operations.gqa.solve import SiteMerge
from surgery.operations.gqa.wide import compute_output, make_wide_tensors


def refine(
    model: PreTrainedModel,
    site: Site,
    merge: SiteMerge,
    kept: Sequence[KeptBatch],
    options: Calibration,
) -> tuple[SiteMerge, float, float]:
    """Train the maps of queries, keys and values and the output projection with Adam.

    The block itself runs, with the merge's heads spread out, so masks, norms, biases and positions
    are what they are. The loss is E|y - y_original|² as a share of E|y_original|²; the original's
    weights stay as they are.

    Returns:
        the refined merge (or the given one, where no step made it better), and the loss over all
        kept batches before and after.
    """
    tensors = {role: t.float().clone().requires_grad_() for role, t in merge.tensors.items()}
    first = [options.refine_lr * float(t.detach().pow(2).mean().sqrt()) for t in tensors.values()]
    groups = [{"params": [t], "lr": lr} for t, lr in zip(tensors.values(), first, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    now = replace(merge, tensors=tensors)
    before = _compute_mean_loss(model, site, merge, kept)
    for step in range(options.refine_steps):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * (1 - step / options.refine_steps)
        with torch.enable_grad():
            loss = _compute_loss(model, site, now, kept[step % len(kept)])
        # Of these alone: the block's other parameters are the model's own.
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
    made = replace(merge, tensors={role: t.detach() for role, t in tensors.items()})
    after = _compute_mean_loss(model, site, made, kept)
    return (made, before, after) if after < before else (merge, before, before)


@torch.no_grad()
def _compute_mean_loss(
    model: PreTrainedModel, site: Site, merge: SiteMerge, kept: Sequence[KeptBatch]
) -> float:
    return sum(float(_compute_loss(model, site, merge, one)) for one in kept) / len(kept)


def _compute_loss(
    model: PreTrainedModel, site: Site, merge: SiteMerge, one: KeptBatch
) -> torch.Tensor:
    tensors = make_wide_tensors(model, site, merge)
    made = compute_output(model, site, tensors, one.args, one.kwargs).float()
    target = one.target.float()
    if one.real is not None:
        made, target = made[one.real], target[one.real]
    return (made - target).pow(2).sum() / target.pow(2).sum().clamp_min(1e-30)
