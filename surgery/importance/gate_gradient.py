"""`gate_gradient`: the slope of the loss in each head's gate (Michel et al. 2019)."""

from __future__ import annotations

import torch

from surgery.data.collate import Batch
from surgery.importance.gates import Gates
from surgery.importance.losses import (
    average_rows,
    compute_label_losses,
    find_labelled_positions,
    select_labelled,
)
from surgery.importance.table import GROUPS, HEADS
from surgery.importance.work import BatchScores, Scores, Work, check_estimator, compute_logits


class GateGradient:
    """I_h = E_x |dL(x) / d gate_h| at gates of 1 (1905.10650, eq. 2), in nats per token.

    L(x) is the mean loss over the labelled positions of one example. Every example has its own
    gates, so the absolute value is taken per example. A group has one gate on all its heads, whose
    derivative is the sum of the derivatives of its heads.
    """

    def __init__(self, work: Work) -> None:
        check_estimator("importance.estimator", "gate_gradient", work.objective)
        self.work = work

    def __call__(self, batch: Batch) -> BatchScores:
        work, where = self.work, find_labelled_positions(batch["labels"], self.work.task)
        rows = len(where.counts)
        device = batch["labels"].device
        gates = {
            site.path: torch.ones(rows, site.q_heads, device=device, requires_grad=True)
            for site in work.sites
        }
        with torch.enable_grad(), Gates(work.model, work.sites, gates) as open_gates:
            losses = compute_label_losses(
                select_labelled(compute_logits(work.model, batch), where), where.labels
            )
            total = average_rows(losses, where).sum()
            open_gates.require_calls()
            gradients = torch.autograd.grad(total, list(gates.values()))
        labelled_rows = where.counts > 0
        scores: Scores = {unit: [] for unit in work.units}
        for site, gradient in zip(work.sites, gradients, strict=True):
            slopes = gradient[labelled_rows].cpu().double()
            if HEADS in work.units:
                scores[HEADS].append(slopes.abs().mean(0))
            if GROUPS in work.units:
                of_groups = slopes.unflatten(1, (site.kv_heads, site.group_size)).sum(2)
                scores[GROUPS].append(of_groups.abs().mean(0))
        loss = float(losses.detach().cpu().double().mean())
        return BatchScores(scores, int(labelled_rows.sum()), where.total, loss)
