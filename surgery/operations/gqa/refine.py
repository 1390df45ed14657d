"""A few gradient steps on the coefficients of one site's merge, towards the original's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.descent import Descent
from surgery.calibration.folds import REPEATED, Folds, number_positions
from surgery.calibration.view import KeptBatch
from surgery.models.sites import Site
from surgery.operations.gqa.solve import SiteMerge
from surgery.operations.gqa.wide import compute_output, make_wide_tensors

# How often the steps may go over their text: on little of it, fewer steps that slow down in time
# leave less of the error on other text than many.
PASSES = 40
# How often the held-out text is looked at.
LOOKS = 6
# After how many looks without a better loss the steps end.
PATIENCE = 2


def refine(
    model: PreTrainedModel,
    site: Site,
    merge: SiteMerge,
    kept: Sequence[KeptBatch],
    folds: Folds,
    options: Calibration,
) -> tuple[SiteMerge, dict[str, float]]:
    """Train the maps of queries, keys and values and the output projection with Adam.

    The block itself runs, with the merge's heads spread out, so masks, norms, biases and positions
    are what they are. The loss is E|y - y_original|² as a share of E|y_original|²; the original's
    weights stay as they are. Part of the text is held out of the steps; what is best there is kept,
    which may be the merge as it was given.

    Returns:
        the merge, and its losses: on held-out text before and after (`output_closed_form`,
        `output_refined`), on the text of the steps (`output_fitted`), and the number of `steps`
        that were kept.
    """
    fitted, held = _split(kept, folds)
    before = best = _compute_mean_loss(model, site, merge, held)
    found, kept_steps = merge, 0
    steps = min(options.refine_steps, PASSES * len(fitted))
    descent = Descent(merge.tensors, options.refine_lr, steps)
    now = replace(merge, tensors=descent.tensors)
    every = max(1, steps // LOOKS)
    for step in range(steps):
        with torch.enable_grad():
            descent.take_step(_compute_loss(model, site, now, fitted[step % len(fitted)]))
        if (step + 1) % every == 0 or step + 1 == steps:
            made = replace(merge, tensors=descent.copy_tensors())
            loss_now = _compute_mean_loss(model, site, made, held)
            if loss_now < best:
                found, best, kept_steps = made, loss_now, step + 1
            elif step + 1 - kept_steps >= PATIENCE * every:
                break
    losses = {
        "output_closed_form": before,
        "output_refined": best,
        "output_fitted": _compute_mean_loss(model, site, found, fitted or held),
        "steps": kept_steps,
    }
    return found, losses


def _split(kept: Sequence[KeptBatch], folds: Folds) -> tuple[list[KeptBatch], list[KeptBatch]]:
    """Split into what the steps see and the last positions, which are held out.

    Positions that repeat earlier text are in neither. Fewer than two are all held out.
    """
    masks = []
    for number, one in enumerate(kept):
        fresh = (folds.get(number, one.aim.target.shape[1]) != REPEATED).to(one.aim.target.device)
        masks.append(fresh if one.real is None else fresh & one.real)
    total = sum(int(mask.sum()) for mask in masks)
    seen = total - max(1, total // folds.count)
    parts: tuple[list[KeptBatch], list[KeptBatch]] = ([], [])
    for one, mask, places in zip(kept, masks, number_positions(masks), strict=True):
        for part, chosen in zip(parts, (places < seen, places >= seen), strict=True):
            if bool((real := mask & chosen).any()):
                part.append(replace(one, real=real))
    return parts if parts[1] else ([], list(kept))


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
    scale = one.aim.scale.float()[..., None]
    target = one.aim.target.float() * scale
    missing = made * scale - target
    if one.real is not None:
        missing, target = missing[one.real], target[one.real]
    return missing.pow(2).sum() / target.pow(2).sum().clamp_min(1e-30)
