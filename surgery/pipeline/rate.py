"""The learning rate of a run: set by `optim.lr`, or chosen by what surgery cost."""

from __future__ import annotations

from typing import Any

import torch

from surgery.config.schema import ObjectiveName, RunConfig
from surgery.console import say
from surgery.pipeline.resume import read_rate
from surgery.pipeline.session import Session
from surgery.training.rate import (
    LEAST_SHARE,
    MIDDLE_SHARE,
    Rate,
    compute_batch_share,
    compute_full_rate,
    compute_loss_share,
)
from surgery.training.teacher import load_teacher


def say_rates(session: Session) -> None:
    """Say, while planning, between which rates one will be chosen."""
    run = session.run
    if run.optim.lr is not None or run.resume is not None or run.model.scratch is not None:
        return
    full = compute_full_rate(session.source.load_config()) * compute_batch_share(_count_tokens(run))
    say(
        f"  learning rate: {LEAST_SHARE * full:.2g} to {full:.2g}, the higher the more surgery "
        "costs (optim.lr: null)"
    )


def choose_rate(session: Session) -> Rate:
    """Choose the peak learning rate of training; every process may, and rank zero's holds.

    Raises:
        ConfigError: it is left open, and the model's config has no width.
    """
    run = session.run
    if run.resume is not None:
        return _continue_rate(session)
    if run.optim.lr is not None:
        return Rate(run.optim.lr, None, "optim.lr sets it")
    full = compute_full_rate(session.source.load_config())
    if run.model.scratch is not None:
        return Rate(full, 1.0, "the model is trained from nothing")
    share, reason = _judge_loss(session)
    tokens = _count_tokens(run)
    share *= compute_batch_share(tokens)
    return Rate(share * full, share, f"{reason}; {tokens:,} tokens a step")


def _judge_loss(session: Session) -> tuple[float, str]:
    """Judge by the loss what share of the full rate is wanted, and say why."""
    measured = session.results.measurements
    before, opened = (measured.get(moment) for moment in ("before", "after_surgery"))
    deferred = session.deferred is not None
    if before is not None and opened is not None:
        share = compute_loss_share(before.loss, opened.loss)
        moved = f"surgery moved the held-out loss from {before.loss:.4f} to {opened.loss:.4f}"
        return max(share, MIDDLE_SHARE) if deferred else share, moved
    if deferred:
        return MIDDLE_SHARE, "training itself removes what will be missed"
    if session.plan.changes_anything:
        return MIDDLE_SHARE, "what surgery cost was not measured (stage measure)"
    if before is not None and _has_teacher(session.run):
        taught = _measure_teacher(session)
        compared = f"the held-out loss is {before.loss:.4f}, the teacher's {taught:.4f}"
        return compute_loss_share(taught, before.loss), compared
    return MIDDLE_SHARE, "no operation of this run came before training"


def _has_teacher(run: RunConfig) -> bool:
    """Whether the model learns from another: what an earlier run's surgery cost shows beside it."""
    return run.objective.name is ObjectiveName.distill and run.objective.teacher is not None


def _measure_teacher(session: Session) -> float:
    from surgery.measure.loss import measure_held_out_loss  # seconds, for datasets and Lightning

    run = session.run
    teacher = load_teacher(run.model, run.objective.teacher).to(session.device)  # type: ignore[arg-type]
    return measure_held_out_loss(
        teacher, session.data, run.measure, run.model.task, label="teacher"
    )


def _continue_rate(session: Session) -> Rate:
    """Find the rate of the checkpoint: Lightning restores it with the optimizer."""
    run = session.run
    assert run.resume is not None
    stored = read_rate(run.resume)
    if run.optim.lr is not None and run.optim.lr != stored:
        say(f"  optim.lr={run.optim.lr:g} is not used: the checkpoint goes on at {stored:g}")
    return Rate(stored, None, "the checkpoint to resume from has it")


def _count_tokens(run: RunConfig) -> int:
    """Count the tokens of an optimizer step over all devices, padding included."""
    trainer = run.trainer
    steps = trainer.get("accumulate_grad_batches") or 1
    nodes = trainer.get("num_nodes") or 1
    devices = _count_devices(trainer.get("devices"), trainer.get("accelerator"))
    return int(run.data.batch_size * run.data.seq_len * steps * nodes * devices)


def _count_devices(devices: Any, accelerator: Any) -> int:
    if isinstance(devices, list):
        return max(1, len(devices))
    if isinstance(devices, int) and devices > 0:
        return devices
    return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())
