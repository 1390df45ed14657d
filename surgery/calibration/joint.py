"""All layers fitted together: gradient steps towards what the original predicts.

Before, each layer was fitted to its own output. What the model predicts depends on all layers, and
on some directions of them far more than on others: only the whole model shows which. This is
knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) of the calibrated tensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from surgery.calibration.descent import Descent
from surgery.calibration.divergence import predict, refuse_no_numbers
from surgery.calibration.folds import REPEATED, Folds, find_real_positions
from surgery.calibration.stream import take_first_row
from surgery.console import track_progress
from surgery.data.collate import Batch
from surgery.errors import get_first_line
from surgery.execute.live import apply_
from surgery.importance.losses import compute_divergences
from surgery.models.convert import convert_model
from surgery.models.copies import make_sharing_copy
from surgery.plan.plan import Plan
from surgery.plan.registry import get_operation
from surgery.transforms import run_transform
from surgery.transforms.edits import TensorEdit

# First step size, relative to the size of a tensor.
RATE = 0.002
# The first steps are smaller: Adam knows little of its gradients yet.
WARMUP = 4
# Nats per position: smaller differences are rounding.
LEAST = 1e-6
# Steps between two looks at the held-out text, and of how many batches of it.
EVERY, LOOKED_AT = 12, 8

# Parts of the text.
SEEN, HELD_OUT = 0, 1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class JointFit:
    """What came of it.

    Attributes:
        tensors: name → calibrated tensor; those that were given where nothing is better.
        figures: the mean KL from the original in nats on held-out text, `kl_before` and `kl_after`;
            and the number of `steps` that were kept.
    """

    tensors: Tensors
    figures: dict[str, float | int]


class Student:
    """The model that a plan makes, as a function of the plan's calibrated tensors.

    Args:
        source: the model the plan is made for; not changed.
        names: the tensors of the plan that are open.
    """

    def __init__(self, source: PreTrainedModel, plan: Plan, names: Sequence[str]) -> None:
        # Steps that change only how the model runs are left out: not all have a gradient.
        steps = tuple(s for s in plan.steps if not get_operation(s.operation).runs_only)
        self.plan = plan
        self.model = apply_(make_sharing_copy(source), replace(plan, steps=steps), check=False)
        self._fixed = {name: t.detach() for name, t in self.model.named_parameters()}
        self._edits: list[tuple[TensorEdit, list[torch.Tensor]]] = []
        self._open: list[str] = []
        if plan.conversion is not None:
            source = convert_model(make_sharing_copy(source), **plan.conversion)
        self._trace(source, set(names))

    @torch.no_grad()
    def _trace(self, source: PreTrainedModel, names: set[str]) -> None:
        """Find the edits that depend on open tensors, and what else they read."""
        known: Tensors = {}
        opened: set[str] = set()
        for edit in self.plan.edits:
            read = [spec.name for spec in edit.sources]
            sources = [known.get(name, source.get_parameter(name).detach()) for name in read]
            given = [spec.name for spec in edit.resolved]
            results = run_transform(
                edit.transform, [*sources, *self.plan.get_inputs(edit)], edit.arguments
            )
            made = [spec.name for spec in edit.results]
            known |= zip(made, results, strict=True)
            depends = not (names.isdisjoint(given) and opened.isdisjoint(read))
            opened.difference_update(edit.dropped, made)
            if depends:
                self._edits.append((edit, sources))
                opened.update(made)
        self._open = sorted(opened)

    def make_parameters(self, tensors: Tensors) -> Tensors:
        """Make the parameters of the model; differentiable in the open tensors."""
        made: Tensors = {}
        for edit, fixed in self._edits:
            sources = [
                made.get(spec.name, tensor)
                for spec, tensor in zip(edit.sources, fixed, strict=True)
            ]
            given = [tensors.get(spec.name, self.plan.tensors[spec.name]) for spec in edit.resolved]
            results = run_transform(edit.transform, [*sources, *given], edit.arguments)
            made |= zip((spec.name for spec in edit.results), results, strict=True)
        return self._fixed | {name: made[name] for name in self._open}

    @torch.no_grad()
    def find_fault(self, batch: Batch) -> str | None:
        """Find why the model cannot run, which the check of a plan explains later."""
        try:
            predict(self.model, take_first_row(batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own code may fail in any way
            return get_first_line(error)
        return None

    def predict(self, parameters: Tensors, batch: Batch) -> torch.Tensor:
        """Compute its logits with these parameters."""
        return predict(self.model, batch, parameters)


class Text:
    """The batches, split into the positions that the steps see and those that are held out.

    The last fold is held out. What repeats earlier text is in neither part.

    Attributes:
        seen, held_out: the numbers of the batches that have such positions; of held-out ones, some.
    """

    def __init__(self, original: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.original, self.batches = original, batches
        self._masks = self._split(Folds(batches))
        self.seen, self.held_out = (
            [number for number, masks in enumerate(self._masks) if bool(masks[part].any())]
            for part in (SEEN, HELD_OUT)
        )
        self.held_out = self.held_out[:: max(1, math.ceil(len(self.held_out) / LOOKED_AT))]

    def compare(self, student: Student, tensors: Tensors, number: int, part: int) -> torch.Tensor:
        """Compute KL(original || student) at a batch's positions of a part, in nats: [P].

        Differentiable in the tensors.
        """
        mask = self._masks[number][part]
        with torch.no_grad():
            log_p = self._select(predict(self.original, self.batches[number]), mask).log_softmax(-1)
        logits = student.predict(student.make_parameters(tensors), self.batches[number])
        return compute_divergences(self._select(logits, mask), log_p)

    @torch.no_grad()
    def measure(self, student: Student, tensors: Tensors) -> torch.Tensor:
        """Compute what each batch adds to the mean KL over held-out positions: [batches].

        Raises:
            ConfigError: what one of the two predicts is not all numbers.
        """
        found = [self.compare(student, tensors, number, HELD_OUT) for number in self.held_out]
        total = sum(map(len, found))
        parts = torch.stack([kl.sum().double().cpu() / total for kl in found])
        refuse_no_numbers(student.model, float(parts.sum()))
        return parts

    @staticmethod
    def _select(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.to(logits.device)
        return logits[mask[:, 0]] if logits.ndim == 2 else logits[mask]

    def _split(self, folds: Folds) -> list[tuple[torch.Tensor, torch.Tensor]]:
        last, masks = folds.count - 1, []
        counts: dict[tuple[tuple[int, ...], ...], int] = {}
        for number, batch in enumerate(self.batches):
            shapes = tuple(tuple(tensor.shape[1:]) for tensor in batch.values())
            if shapes not in counts:
                counts[shapes] = self._count_predictions(batch)
            of = folds.get(number, counts[shapes])
            real = find_real_positions(self.original, batch)
            counted = real.cpu().bool() if real is not None and real.shape == of.shape else of == of
            masks.append((counted & (of != REPEATED) & (of != last), counted & (of == last)))
        return masks

    def _count_predictions(self, batch: Batch) -> int:
        """Count the predictions for each row of a batch."""
        with torch.no_grad():
            shape = predict(self.original, take_first_row(batch)).shape
        return 1 if len(shape) == 2 else shape[1]


def fit_jointly(
    student: Student, text: Text, tensors: Mapping[str, torch.Tensor], steps: int
) -> JointFit:
    """Train tensors with Adam towards the original's predictions; keep what is best held out.

    The loss is the mean of KL(original || student) over the positions of a batch that the steps
    see. The steps become smaller in time, so the last that is not worse than another on held-out
    text, beyond the standard error of the difference, is kept; none that is not better there than
    the tensors as they were given.

    Args:
        tensors: name → open tensor of the student's plan.
        steps: one for each batch that the steps see, then from the first on again.

    Raises:
        ConfigError: what one of the two predicts is not all numbers.
    """
    descent = Descent(tensors, RATE, steps, WARMUP)
    found, kept = dict(tensors), 0
    with track_progress("all layers together", steps) as progress:
        before = best = text.measure(student, descent.tensors)
        for step in range(steps):
            number = text.seen[step % len(text.seen)]
            with torch.enable_grad():
                loss = text.compare(student, descent.tensors, number, SEEN).mean()
                refuse_no_numbers(student.model, float(loss.detach()))
                descent.take_step(loss)
            progress.advance()
            if (step + 1) % EVERY and step + 1 != steps:
                continue
            now = text.measure(student, descent.tensors)
            better = float((now - before).sum()) < -LEAST
            if better and float((now - best).sum()) <= (_compute_error(now - best) if kept else 0):
                found, best, kept = descent.copy_tensors(), now, step + 1
    kl = {"kl_before": float(before.sum()), "kl_after": float(best.sum())}
    return JointFit(found, {**kl, "steps": kept})


def _compute_error(parts: torch.Tensor) -> float:
    """Compute the standard error of the sum of parts that are measured independently."""
    return float(parts.std() * len(parts) ** 0.5) if len(parts) > 1 else 0.0
