"""`leave_one_out`: the loss without each head minus the loss with all heads. Exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from surgery.config.schema import ObjectiveName
from surgery.console import say
from surgery.data.collate import Batch
from surgery.errors import join_lines
from surgery.importance.capture import capture
from surgery.importance.gates import Gates
from surgery.importance.losses import (
    LabelledPositions,
    compute_divergences,
    compute_label_losses,
    find_labelled_positions,
    select_labelled,
)
from surgery.importance.replay import resume
from surgery.importance.work import (
    Ablation,
    BatchScores,
    Work,
    compute_logits,
    list_ablations,
    make_empty_scores,
)
from surgery.models.stack import NotResumable, find_stack

# How far a resumed pass may be from a full pass because of rounding, in nats per token.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
HALF_ROUNDING = 3e-2
# The number of positions side by side that is fastest on a CPU. With more, the values between two
# matrix products no longer fit into its caches; with fewer, the calls cost more than the work.
CPU_POSITIONS = 512
# Number of an ablation, and its labelled logits [P, V].
_Ablated = tuple[int, torch.Tensor]


class LeaveOneOut:
    """L(gate_h = 0) - L, over all labelled positions of a batch, in nats per token.

    With objective distill L is KL(unchanged model || gated model), which is 0 with all heads.

    Ablations share their work (see `resume`). The first ablation of each site is compared with a
    full pass through `Gates`. If the model cannot be resumed, or its resumed passes differ by more
    than rounding, every head gets a full pass, and a printed line says so.

    Args:
        share: whether ablations may share work.
    """

    def __init__(self, work: Work, *, share: bool = True) -> None:
        self.work = work
        self.ablations = list_ablations(work.sites, work.units)
        self.shared: SharedPasses | None = None
        self._checked: set[tuple[int, int]] = set()
        if share:
            try:
                self.shared = SharedPasses(work, self.ablations)
            except NotResumable as reason:
                self._give_up(reason)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> BatchScores:
        total = find_labelled_positions(batch["labels"], self.work.task).total
        sums, loss = torch.zeros(len(self.ablations), dtype=torch.float64), 0.0
        for rows in self._split_rows(batch):
            where = find_labelled_positions(rows["labels"], self.work.task)
            if where.total:
                lost, base = self._measure_losses(rows, where)
                sums += lost
                loss += base
        if self.work.objective is ObjectiveName.lm:
            sums -= loss
        scores = make_empty_scores(self.work.sites, self.work.units)
        for ablation, value in zip(self.ablations, (sums / total).tolist(), strict=True):
            for unit, index in ablation.units:
                scores[unit][ablation.site][index] = value
        return BatchScores(scores, total, total, loss / total)

    def _split_rows(self, batch: Batch) -> Iterator[Batch]:
        rows = len(batch["labels"])
        size = self.shared.count_rows(batch) if self.shared is not None else self.work.memory_rows
        for start in range(0, rows, size):
            yield {
                name: value[start : start + size] if value.ndim and len(value) == rows else value
                for name, value in batch.items()
            }

    def _measure_losses(self, batch: Batch, where: LabelledPositions) -> tuple[torch.Tensor, float]:
        """Measure the loss of each ablation, and the label loss of the unchanged model.

        Both are sums over positions.
        """
        if self.shared is not None:
            try:
                return self._measure_shared(self.shared, batch, where)
            except torch.OutOfMemoryError:
                raise
            except Exception as reason:  # the model's own code may fail in any way when resumed
                self._give_up(reason)
        with Gates(self.work.model, self.work.sites) as gates:
            whole = select_labelled(compute_logits(self.work.model, batch), where)
        gates.require_calls()
        loss, base = self._compute_base(whole, where)
        lost = [self._measure_whole(ablation, batch, where, base) for ablation in self.ablations]
        return torch.tensor(lost, dtype=torch.float64), loss

    def _measure_shared(
        self, shared: SharedPasses, batch: Batch, where: LabelledPositions
    ) -> tuple[torch.Tensor, float]:
        logits, resume_ablations = shared.run(batch)
        loss, base = self._compute_base(select_labelled(logits, where), where)
        del logits
        lost = torch.zeros(len(self.ablations), dtype=torch.float64)
        for number, ablated in resume_ablations(where):
            lost[number] = sum_losses(ablated, where, base)
            ablation = self.ablations[number]
            kind = (ablation.site, len(ablation.heads))
            if kind not in self._checked:
                self._check(float(lost[number]), ablation, batch, where, base)
                self._checked.add(kind)
        return lost, loss

    def _check(
        self,
        resumed: float,
        ablation: Ablation,
        batch: Batch,
        where: LabelledPositions,
        base: torch.Tensor | None,
    ) -> None:
        alone = self._measure_whole(ablation, batch, where, base)
        off = abs(alone - resumed) / max(where.total, alone)
        if not off <= ROUNDING.get(self.work.model.dtype, HALF_ROUNDING):
            path = self.work.sites[ablation.site].path
            raise NotResumable(f"passes resumed at {path} are off by {off:.1g} of the loss")

    def _measure_whole(
        self, ablation: Ablation, batch: Batch, where: LabelledPositions, base: torch.Tensor | None
    ) -> float:
        work, site = self.work, self.work.sites[ablation.site]
        gate = torch.ones(site.q_heads, device=batch["labels"].device)
        gate[list(ablation.heads)] = 0
        with Gates(work.model, [site], {site.path: gate}):
            return sum_losses(
                select_labelled(compute_logits(work.model, batch), where), where, base
            )

    def _compute_base(
        self, whole: torch.Tensor, where: LabelledPositions
    ) -> tuple[float, torch.Tensor | None]:
        """Compute the label loss, and for distill the log-probabilities to compare with."""
        distill = self.work.objective is ObjectiveName.distill
        return sum_losses(whole, where, None), whole.log_softmax(-1) if distill else None

    def _give_up(self, reason: Exception) -> None:
        self.shared = None
        say(f"  leave_one_out: a full pass for every head, because {join_lines(reason)}")


class SharedPasses:
    """Runs each row once and resumes it for every ablation.

    Raises:
        NotResumable: see `find_stack`.
    """

    def __init__(self, work: Work, ablations: Sequence[Ablation]) -> None:
        self.work, self.ablations = work, ablations
        self.stack = find_stack(work.model, work.sites)
        # Site after site. Heads and groups are separate: ablations side by side have one size.
        alike: dict[tuple[int, int], list[int]] = {}
        for number, ablation in enumerate(ablations):
            alike.setdefault((ablation.site, len(ablation.heads)), []).append(number)
        self.alike = list(alike.values())

    def count_rows(self, batch: Batch) -> int:
        """Count the rows of `batch` that fit into one pass with their ablations side by side."""
        return max(1, self._count_side_by_side(batch) // max(map(len, self.alike)))

    def run(self, batch: Batch) -> tuple[torch.Tensor, Callable[..., Iterator[_Ablated]]]:
        """Run the unchanged model; return its logits, and a function that resumes it.

        The function takes the labelled positions and yields the labelled logits per ablation.

        Raises:
            NotResumable: see `capture` and `resume`.
        """
        logits, traces = capture(self.work.model, self.stack, self.work.sites, batch)

        def resume_ablations(where: LabelledPositions) -> Iterator[_Ablated]:
            rows = len(where.counts)
            many = max(1, self._count_side_by_side(batch) // rows)
            for numbers in self.alike:
                site = self.ablations[numbers[0]].site
                for start in range(0, len(numbers), many):
                    chunk = numbers[start : start + many]
                    logits_of_chunk = resume(
                        self.work.model,
                        self.stack,
                        self.work.sites[site],
                        self.stack.index[site],
                        traces,
                        batch,
                        [self.ablations[number] for number in chunk],
                        where,
                    )
                    yield from zip(chunk, logits_of_chunk, strict=True)

        return logits, resume_ablations

    def _count_side_by_side(self, batch: Batch) -> int:
        """Count the rows, ablations included, that one pass takes."""
        values = [value for value in batch.values() if value.ndim > 1]
        if not values or values[0].device.type != "cpu":
            return self.work.memory_rows
        length = max(value.shape[1] for value in values)
        return max(1, min(self.work.memory_rows, CPU_POSITIONS // length))


def sum_losses(logits: torch.Tensor, where: LabelledPositions, base: torch.Tensor | None) -> float:
    """Sum the label losses of logits [P, V], or with `base` their divergence from it."""
    if base is None:
        losses = compute_label_losses(logits, where.labels)
    else:
        losses = compute_divergences(logits, base)
    return float(losses.cpu().double().sum())
