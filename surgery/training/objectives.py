"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveConfig, ObjectiveName, Task
from surgery.data.collate import IGNORED, Batch
from surgery.models.packed import make_inputs
from surgery.training.attention_match import Outputs, compute_attention_error
from surgery.training.pairs import Pair


class Loss(NamedTuple):
    """A scalar to minimise, and named scalars worth logging (nats per token, or a share)."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


def compute_training_loss(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Batch,
    cfg: ObjectiveConfig,
    task: Task,
    pairs: Sequence[Pair] = (),
) -> Loss:
    """Compute `objective.*` on one batch.

    lm: the model's own label loss. distill: (1 - w) T^2 KL(teacher || model) + w label loss,
    the KL averaged over the positions that carry a label (Hinton et al. 2015).

    Args:
        pairs: output projections of the model and of the teacher, for
            `compute_attention_error`, which is added to distill with `attention_weight`; none: it
            is left out.

    Raises:
        SurgeryError: the attention of the two cannot be compared.
    """
    if cfg.name is ObjectiveName.lm:
        return Loss(model(**make_inputs(model, batch)).loss, {})
    assert teacher is not None
    student_outputs = Outputs(model, [own for own, _ in pairs])
    teacher_outputs = Outputs(teacher, [path for _, path in pairs])
    inputs = make_inputs(model, batch)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    teacher_inputs = make_inputs(teacher, unlabelled)
    with student_outputs:
        output = model(**inputs)
    with teacher_outputs, torch.no_grad():
        target = teacher(**teacher_inputs).logits
    kl = compute_distillation_kl(output.logits, target, batch["labels"], cfg.temperature, task)
    total = (1 - cfg.label_weight) * kl + cfg.label_weight * output.loss
    parts = {"kl": kl.detach(), "label_loss": output.loss.detach()}
    if pairs:
        attention = compute_attention_error(
            student_outputs, teacher_outputs, pairs, batch.get("attention_mask")
        )
        total = total + cfg.attention_weight * attention
        parts["attention"] = attention.detach()
    return Loss(total, parts)


def compute_distillation_kl(
    logits: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    task: Task,
) -> torch.Tensor:
    """Compute T^2 KL(softmax(target/T) || softmax(logits/T)) in nats, the mean over labelled
    positions.

    Args:
        logits, target: [B, S, V], or [B, C] for classification.
        labels: [B, S] with -100 where nothing is predicted; causal models predict one ahead.
    """
    if task is Task.causal_lm:
        logits, target, labels = logits[:, :-1], target[:, :-1], labels[:, 1:]
    if task is not Task.sequence_classification:
        wanted = labels != IGNORED
        logits, target = logits[wanted], target[wanted]
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(target.float() / temperature, dim=-1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return kl * temperature**2 / max(1, log_p.shape[0])


def count_labelled(batch: Batch, task: Task) -> int:
    """Count the positions (or rows) that a batch's label loss is a mean over."""
    labels = batch["labels"][:, 1:] if task is Task.causal_lm else batch["labels"]
    return int((labels != IGNORED).sum())
