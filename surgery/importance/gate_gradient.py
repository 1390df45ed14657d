"""`gate_gradient`: how steeply the loss falls with each head's gate (Michel et al. 2019)."""

from __future__ import annotations

import torch

from surgery.importance.check import check_estimator
from surgery.importance.gates import Gates
from surgery.importance.losses import judged, label_losses, row_means, targets
from surgery.importance.table import GROUPS, HEADS
from surgery.importance.work import Batch, BatchScores, Scores, Work, logits_of


class GateGradient:
    """I_h = E_x |dL(x) / d gate_h| at gates of 1 (1905.10650, eq. 2), in nats per token.

    L(x) is the mean loss over one example's labelled positions; the absolute value is taken per
    example, as every row has gates of its own. A group's gate is one gate on all its heads: its
    derivative is the sum of theirs.
    """

    def __init__(self, work: Work) -> None:
        check_estimator("importance.estimator", "gate_gradient", work.objective)
        self.work = work

    def __call__(self, batch: Batch) -> BatchScores:
        work, where = self.work, targets(batch["labels"], self.work.task)
        rows = len(where.counts)
        device = batch["labels"].device
        gates = {
            site.path: torch.ones(rows, site.q_heads, device=device, requires_grad=True)
            for site in work.sites
        }
        with torch.enable_grad(), Gates(work.model, work.sites, gates) as open_gates:
            losses = label_losses(judged(logits_of(work.model, batch), where), where.labels)
            total = row_means(losses, where).sum()
            open_gates.require_calls()
            gradients = torch.autograd.grad(total, list(gates.values()))
        judged_rows = where.counts > 0
        scores: Scores = {unit: [] for unit in work.units}
        for site, gradient in zip(work.sites, gradients, strict=True):
            found = gradient[judged_rows].cpu().double()
            if HEADS in work.units:
                scores[HEADS].append(found.abs().mean(0))
            if GROUPS in work.units:
                together = found.unflatten(1, (site.kv_heads, site.group_size)).sum(2)
                scores[GROUPS].append(together.abs().mean(0))
        loss = float(losses.detach().cpu().double().mean())
        return BatchScores(scores, int(judged_rows.sum()), where.total, loss)
