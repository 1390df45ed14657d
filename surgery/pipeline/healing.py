"""Check and resolve the options of healing, before anything is written."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, RunConfig, Task, Trained
from surgery.errors import ConfigError
from surgery.models.sites import find_sites, get_text_config
from surgery.plan.plan import Plan
from surgery.training.pairs import Pair, pair_sites, pair_with_original
from surgery.training.parameters import check_parameters
from surgery.training.teacher import locate_teacher, naming_teacher

_TEACHER = "objective.teacher"
# Steps between two validations: at least, and where the number of steps is not known.
LEAST_STEPS, STEPS_WITHOUT_END = 10, 100


def check_healing(
    run: RunConfig, original: PreTrainedModel, plan: Plan, *, changes: bool | None = None
) -> None:
    """Check `optim.parameters` and `objective.*` against the model and its plan.

    Args:
        original: the source of the plan, which may live on the meta device.
        changes: whether the trained model differs from the original; by default, whether the plan
            changes anything.

    Raises:
        ConfigError: there is nothing to train or nothing to learn, or the teacher does not fit.
    """
    _check_validation(run)
    check_parameters(plan, run.optim.parameters)
    if run.optim.parameters in (Trained.attention, Trained.output):
        _refuse_unreadable(original, "optim.parameters")
    if run.objective.name is not ObjectiveName.distill:
        return
    _refuse_itself(run, plan.changes_anything if changes is None else changes)
    if run.objective.teacher is not None:
        _check_teacher(run, original)
    if run.objective.attention_weight > 0:
        _refuse_unreadable(original, "objective.attention_weight")
        pair_with_teacher(run, original.config, plan)


def find_cadence(run: RunConfig) -> int | None:
    """Find the optimizer steps between two validations; ``None`` where `trainer.*` says when."""
    if _sets_validation(run):
        return None
    if run.validation.every_n_steps is not None:
        return run.validation.every_n_steps
    steps = run.trainer.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        return max(LEAST_STEPS, steps // 10)
    return STEPS_WITHOUT_END


def schedule_validation(run: RunConfig) -> dict[str, Any]:
    """Make the options of Lightning's Trainer for that cadence; it counts batches, not steps."""
    every = find_cadence(run)
    if every is None:
        return {}
    batches = every * (run.trainer.get("accumulate_grad_batches") or 1)
    return {"val_check_interval": batches, "check_val_every_n_epoch": None}


def _sets_validation(run: RunConfig) -> bool:
    trainer = run.trainer
    epochs = trainer.get("check_val_every_n_epoch", 1)
    return trainer.get("val_check_interval") is not None or epochs != 1


def _check_validation(run: RunConfig) -> None:
    if run.validation.every_n_steps is not None and _sets_validation(run):
        raise ConfigError(
            "validation.every_n_steps",
            "trainer.val_check_interval or trainer.check_val_every_n_epoch says when, too",
            given=run.validation.every_n_steps,
            valid="null, or neither of these",
        )


def pair_with_teacher(run: RunConfig, config: Any, plan: Plan) -> list[Pair] | None:
    """Pair the output projections of the model with those of its teacher; ``None``: no comparison.

    Args:
        config: the original's.

    Raises:
        ConfigError: they cannot be paired, or differ in width.
    """
    if run.objective.attention_weight == 0:
        return None
    if run.objective.teacher is None:
        return pair_with_original(plan)
    teacher = _build_teacher(run)
    sites = find_sites(teacher).sites
    layers = [
        getattr(get_text_config(c), "num_hidden_layers", None) for c in (config, teacher.config)
    ]
    pairs = pair_sites(
        plan, {site.path: site.output.path for site in sites}, same_depth=layers[0] == layers[1]
    )
    own_widths = {site.output.path: site.hidden_size for site in plan.after}
    teacher_widths = {site.output.path: site.hidden_size for site in sites}
    for own, other in pairs:
        if own_widths[own] != teacher_widths[other]:
            raise ConfigError(
                "objective.attention_weight",
                f"the teacher's {other} has another width than the model's {own}",
                given=f"{teacher_widths[other]} and {own_widths[own]}",
                valid="0, or a teacher of the model's width",
            )
    return pairs


def _build_teacher(run: RunConfig) -> PreTrainedModel:
    """Build the teacher on the meta device."""
    with naming_teacher(run.objective.teacher):
        return locate_teacher(run.model, run.objective.teacher).build_meta_model()


def _refuse_itself(run: RunConfig, changes: bool) -> None:
    itself = run.objective.teacher in (None, run.model.path) and run.model.scratch is None
    if itself and not changes and run.objective.label_weight == 0:
        raise ConfigError(
            _TEACHER,
            "the model would learn from itself, which changes nothing",
            given=run.objective.teacher or "null: the original, which no operation changes",
            valid="the model it was made from, objective=lm, or objective.label_weight above 0",
        )


def _check_teacher(run: RunConfig, original: PreTrainedModel) -> None:
    teacher, name = _build_teacher(run), run.objective.teacher
    with naming_teacher(name):
        locate_teacher(run.model, name).check_weights()
    task = run.model.task
    sizes = _count_outputs(teacher, task), _count_outputs(original, task)
    if sizes[0] != sizes[1]:
        what = "classes" if task is Task.sequence_classification else "tokens"
        raise ConfigError(
            _TEACHER,
            f"predicts {sizes[0]} {what}, but the model {sizes[1]}",
            given=name,
            valid="a model with the same vocabulary",
        )
    limit = getattr(get_text_config(teacher.config), "max_position_embeddings", None)
    if isinstance(limit, int) and run.data.seq_len > limit:
        raise ConfigError(
            _TEACHER,
            f"has {limit} positions, fewer than data.seq_len={run.data.seq_len}",
            given=name,
            valid=f"data.seq_len of at most {limit}, or another teacher",
        )
    if task is Task.sequence_classification:
        _check_classifier(teacher, name)


def _check_classifier(teacher: PreTrainedModel, name: str | None) -> None:
    kind = type(teacher).__name__
    if kind not in (teacher.config.architectures or [kind]):
        raise ConfigError(
            _TEACHER,
            f"was saved without the head of a {kind}, and a random head teaches nothing",
            given=name,
            valid="a trained classifier",
        )
    if teacher.config.pad_token_id is None:
        raise ConfigError(
            _TEACHER,
            "has no pad token, and sequence_classification pads its batches",
            given=name,
            valid="a model whose config.json has a pad_token_id",
        )


def _count_outputs(model: PreTrainedModel, task: Task) -> int:
    """Count the tokens or classes that a model has logits for."""
    config: Any = model.config
    if task is Task.sequence_classification:
        return int(config.num_labels)
    head: Any = model.get_output_embeddings()
    text: Any = get_text_config(config)
    return int(text.vocab_size if head is None else head.weight.shape[0])


def _refuse_unreadable(model: PreTrainedModel, key: str) -> None:
    """Refuse a model with attention that cannot be read: all of it is trained, or none."""
    unreadable = find_sites(model).unreadable
    if unreadable:
        block = unreadable[0]
        raise ConfigError(
            key,
            f"attention of this model cannot be read: {block.reason}",
            given=f"{block.path} ({block.kind})",
        )
