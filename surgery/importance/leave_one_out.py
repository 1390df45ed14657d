"""`leave_one_out`: the loss without each head, less the loss with all of them. Exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery.config.schema import ObjectiveName
from surgery.console import say
from surgery.importance.capture import Unfit
from surgery.importance.gates import Gates
from surgery.importance.losses import Targets, divergences, judged, label_losses, targets
from surgery.importance.sharing import Shared
from surgery.importance.work import (
    Ablation,
    Batch,
    BatchScores,
    Work,
    ablations,
    empty_scores,
    logits_of,
)

# How far a resumed pass may be from a whole one, in nats per token: rounding.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
HALF_ROUNDING = 3e-2


class LeaveOneOut:
    """L(gate_h = 0) - L, over all labelled positions of a batch, in nats per token.

    With objective distill L is KL(model as it is || gated model), which is 0 with all heads.

    Ablations share their work (see `resume`). The first of each site is compared with a whole pass
    through `Gates`; a model that cannot be resumed, or whose resumed passes differ by more than
    rounding, gets a whole pass per head, and a line says so.

    Args:
        share: whether ablations may share work.
    """

    def __init__(self, work: Work, *, share: bool = True) -> None:
        self.work = work
        self.cuts = ablations(work.sites, work.units)
        self.shared: Shared | None = None
        self._checked: set[tuple[int, int]] = set()
        if share:
            try:
                self.shared = Shared(work, self.cuts)
            except Unfit as reason:
                self._give_up(reason)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> BatchScores:
        total = targets(batch["labels"], self.work.task).total
        sums, loss = torch.zeros(len(self.cuts), dtype=torch.float64), 0.0
        for rows in self._row_groups(batch):
            where = targets(rows["labels"], self.work.task)
            if where.total:
                lost, base = self._lost(rows, where)
                sums += lost
                loss += base
        if self.work.objective is ObjectiveName.lm:
            sums -= loss
        scores = empty_scores(self.work.sites, self.work.units)
        for cut, value in zip(self.cuts, (sums / total).tolist(), strict=True):
            for unit, index in cut.units:
                scores[unit][cut.site][index] = value
        return BatchScores(scores, total, total, loss / total)

    def _row_groups(self, batch: Batch) -> Iterator[Batch]:
        rows = len(batch["labels"])
        size = self.shared.rows(batch) if self.shared is not None else self.work.memory_rows
        for start in range(0, rows, size):
            yield {
                name: value[start : start + size] if value.ndim and len(value) == rows else value
                for name, value in batch.items()
            }

    def _lost(self, batch: Batch, where: Targets) -> tuple[torch.Tensor, float]:
        """Loss under each ablation, and label loss of the model as it is; sums over positions."""
        if self.shared is not None:
            try:
                return self._lost_shared(self.shared, batch, where)
            except torch.OutOfMemoryError:
                raise
            except Exception as reason:  # whatever a model's own code makes of being resumed
                self._give_up(reason)
        with Gates(self.work.model, self.work.sites) as gates:
            whole = judged(logits_of(self.work.model, batch), where)
        gates.require_calls()
        loss, base = self._base(whole, where)
        lost = [self._lost_alone(cut, batch, where, base) for cut in self.cuts]
        return torch.tensor(lost, dtype=torch.float64), loss

    def _lost_shared(
        self, shared: Shared, batch: Batch, where: Targets
    ) -> tuple[torch.Tensor, float]:
        logits, resumed = shared.run(batch)
        loss, base = self._base(judged(logits, where), where)
        del logits
        lost = torch.zeros(len(self.cuts), dtype=torch.float64)
        for number, found in resumed(where):
            lost[number] = summed(found, where, base)
            cut = self.cuts[number]
            kind = (cut.site, len(cut.heads))
            if kind not in self._checked:
                self._check(float(lost[number]), cut, batch, where, base)
                self._checked.add(kind)
        return lost, loss

    def _check(
        self,
        resumed: float,
        cut: Ablation,
        batch: Batch,
        where: Targets,
        base: torch.Tensor | None,
    ) -> None:
        alone = self._lost_alone(cut, batch, where, base)
        off = abs(alone - resumed) / max(where.total, alone)
        if not off <= ROUNDING.get(self.work.model.dtype, HALF_ROUNDING):
            path = self.work.sites[cut.site].path
            raise Unfit(f"passes resumed at {path} are off by {off:.1g} of the loss")

    def _lost_alone(
        self, cut: Ablation, batch: Batch, where: Targets, base: torch.Tensor | None
    ) -> float:
        work, site = self.work, self.work.sites[cut.site]
        gate = torch.ones(site.q_heads, device=batch["labels"].device)
        gate[list(cut.heads)] = 0
        with Gates(work.model, [site], {site.path: gate}):
            return summed(judged(logits_of(work.model, batch), where), where, base)

    def _base(self, whole: torch.Tensor, where: Targets) -> tuple[float, torch.Tensor | None]:
        """Label loss, and for distill the log-probabilities that ablations are compared with."""
        distill = self.work.objective is ObjectiveName.distill
        return summed(whole, where, None), whole.log_softmax(-1) if distill else None

    def _give_up(self, reason: object) -> None:
        self.shared = None
        text = " ".join(str(reason).split()) or type(reason).__name__
        say(f"  leave_one_out: a whole pass for every head, since {text}")


def summed(logits: torch.Tensor, where: Targets, base: torch.Tensor | None) -> float:
    """Label losses of [P, V] logits, or their distance from log-probabilities; over positions."""
    lost = label_losses(logits, where.labels) if base is None else divergences(logits, base)
    return float(lost.cpu().double().sum())
