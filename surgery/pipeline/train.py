"""The stage `train`: Lightning's Trainer around the operated model."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from transformers import PreTrainedModel

from surgery.config.schema import ExportFormat, Kept, RunConfig, Stage
from surgery.console import say
from surgery.errors import ConfigError, get_first_line
from surgery.lab.report.healing import describe_healing, describe_rate
from surgery.models.source import ModelSource
from surgery.pipeline.files import BEST_WEIGHTS, FINAL_CHECKPOINT
from surgery.pipeline.healing import find_cadence, pair_with_teacher, schedule_validation
from surgery.pipeline.log import open_loggers
from surgery.pipeline.rate import choose_rate
from surgery.pipeline.resume import plain_config
from surgery.pipeline.scorer import keep_tables, make_scorer
from surgery.pipeline.session import Session
from surgery.plan.plan import Plan
from surgery.signals import Stopped
from surgery.training.best_weights import BestWeights, FirstAndLastValidation
from surgery.training.curve import LossCurve
from surgery.training.module import SurgeryModule
from surgery.training.trainer import build_trainer, forget_profile, say_profile


def train(session: Session) -> Any:
    """Train, and put the trained model into `session.model`.

    Returns:
        What training decided about the deferred operation; ``None`` if there is none.

    Raises:
        ConfigError: Lightning refuses the options only now, or no step was done.
    """
    rate = choose_rate(session)
    session.run = run = replace(session.run, optim=replace(session.run.optim, lr=rate.value))
    say(f"  {describe_rate(rate.value, rate.share, rate.reason)}")
    module = build_module(run, session.source, session.plan, **_make_deferred(session))
    if session.model is not None:
        module.adopt(session.model)
    pl.seed_everything(run.seed, verbose=False)
    if any(isinstance(c, StochasticWeightAveraging) for c in session.prepared.callbacks):
        module.configure_model()  # it copies the module before Lightning has it built
    curve = LossCurve()
    session.data.validation_windows = run.validation.windows
    best = BestWeights(
        session.run_dir / BEST_WEIGHTS,
        keep=run.validation.keep is Kept.best,
        resumed=run.resume,
        windows=f"{session.data.hash_validation_rows()} {run.trainer.get('limit_val_batches')}",
    )
    ends = FirstAndLastValidation(best, find_cadence(run))
    open_loggers(session)
    forget_profile(session.run_dir)
    trainer = build_trainer(
        dict(run.trainer),
        run_dir=session.run_dir,
        callbacks=[best, *session.prepared.callbacks, curve, ends],
        loggers=session.loggers,
        schedule=schedule_validation(run),
    )
    _say_validation(session, trainer)
    _fit(trainer, module, session)
    say_profile(trainer, session.run_dir)
    if trainer.global_step == 0:
        raise ConfigError("trainer", "no training step was done with these options")
    session.model = _gather_model(module, trainer, session, best)
    session.results.training = _describe_training(run, module, trainer, curve)
    session.results.training["rate"] = {"share": rate.share, "reason": rate.reason}
    session.results.training["held_out"] = _describe_validation(session, trainer, best)
    say(f"  trained {trainer.global_step} steps")
    if trainer.limit_val_batches != 0 and not best.evaluations:  # spawned processes keep theirs
        say("  no held-out loss came back from training: the last weights are kept")
    for line in describe_healing(session.results.training, exported=session.has(Stage.export)):
        say(f"  {line}")
    if module.decision is None:
        return None
    decision = module.decision.finish(trainer)
    session.results.training["decision"] = dict(module.decision.to_json())
    return decision


def _fit(trainer: pl.Trainer, module: SurgeryModule, session: Session) -> None:
    """Train; what ends it early ends the other processes of the run too.

    Raises:
        ConfigError: Lightning refuses the options only now.
        Stopped: by a signal; it knows the step and the newest checkpoint.
    """
    resume = session.run.resume
    try:
        trainer.fit(module, datamodule=session.data, ckpt_path=resume, weights_only=True)
    except MisconfigurationException as error:  # options or callbacks that contradict each other
        raise ConfigError("trainer", get_first_line(error)) from None
    except SIGTERMException:  # Lightning's, in the moment before training starts
        raise _describe_stop(Stopped(signal.SIGTERM), trainer, session) from None
    except Stopped as stop:
        raise _describe_stop(stop, trainer, session) from None
    finally:
        launcher = trainer.strategy.launcher
        if trainer.interrupted and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)


def _describe_stop(stop: Stopped, trainer: pl.Trainer, session: Session) -> Stopped:
    checkpoint = _find_checkpoint(trainer)
    stop.step = trainer.global_step
    stop.checkpoint = None if checkpoint is None else session.run_dir / checkpoint
    return stop


def _gather_model(
    module: SurgeryModule, trainer: pl.Trainer, session: Session, best: BestWeights
) -> PreTrainedModel | None:
    """Gather the trained model with its best weights; ``None`` on other ranks of a sharded run."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        path = session.run_dir / FINAL_CHECKPOINT
        trainer.save_checkpoint(path)
        if not trainer.is_global_zero:
            return None
        module = SurgeryModule.load_from_checkpoint(path, map_location="cpu")
    assert module.model is not None
    if best.best is not None and best.keep:
        trainer.strategy.barrier("best weights")  # one process has written them
        if trainer.is_global_zero or best.file.is_file():  # other machines may not have it
            best.restore_(module.model)
        trainer.strategy.barrier("restored")
        if not trainer.checkpoint_callbacks and trainer.is_global_zero:  # nothing will be resumed
            best.file.unlink(missing_ok=True)
    module.undo_freezing()
    return module.model.to(session.device)  # type: ignore[arg-type]


def _describe_training(
    run: RunConfig, module: SurgeryModule, trainer: pl.Trainer, curve: LossCurve
) -> dict[str, Any]:
    """Describe the training for the summary; every process must call it, to count tokens."""
    return {
        "steps": trainer.global_step,
        "tokens": _count_tokens(curve, trainer),
        "data": _name_data(run),
        "seq_len": run.data.seq_len,
        "objective": run.objective.name.value,
        "attention_weight": run.objective.attention_weight,
        "teacher": run.objective.teacher,
        "optimizer": run.optim.name.value,
        "parameters": run.optim.parameters.value,
        "trainable_parameters": module.trained,
        "lr": run.optim.lr,
        "final_train_loss": _to_float(trainer.callback_metrics.get("train/loss")),
        "checkpoint": _find_checkpoint(trainer),
        "curve": curve.points,
        "heads": _find_heads_table(trainer),
        "alarms": [alarm for c in trainer.callbacks for alarm in getattr(c, "alarms", ())],  # type: ignore[attr-defined]
        "decision": None,
        "reverted": None,
    }


def _say_validation(session: Session, trainer: pl.Trainer) -> None:
    if trainer.limit_val_batches == 0:
        say("  trainer.limit_val_batches=0: no held-out loss is looked at while the model trains")
        return
    every = find_cadence(session.run)
    when = f"every {every} steps" if every else "as trainer.* says"
    rows, total = _count_validated_rows(session, trainer), session.data.held_out_size
    say(f"  held-out loss at the start, {when} and at the end, on {rows} of {total} windows")
    shared = session.data.count_shared_rows(session.run.measure.windows)
    if shared and session.has(Stage.measure):
        say(
            f"  the held-out text is short: {shared} of the windows that choose the weights are "
            "measured, too (measure.windows, validation.windows)"
        )


def _count_validated_rows(session: Session, trainer: pl.Trainer) -> int:
    """Count the windows of a validation; `trainer.limit_val_batches` may leave some out."""
    rows, size = session.data.count_validation_rows(), session.run.data.batch_size
    limit = trainer.limit_val_batches
    mine = rows if rows < trainer.world_size else rows // trainer.world_size
    batches = min(limit, math.ceil(mine / size)) if isinstance(limit, int) else 0
    if isinstance(limit, float):  # Lightning rounds a share down
        batches = int(math.ceil(mine / size) * limit)
    seen = min(batches * size, mine)
    return seen if rows < trainer.world_size else min(rows, seen * trainer.world_size)


def _describe_validation(
    session: Session, trainer: pl.Trainer, best: BestWeights
) -> dict[str, Any] | None:
    """Describe the held-out losses that training saw; ``None`` if there are none."""
    if not best.evaluations:
        return None
    lowest = best.best
    kept = lowest if best.keep and lowest is not None else best.evaluations[-1]
    return {
        "every_n_steps": find_cadence(session.run),
        "windows": _count_validated_rows(session, trainer),
        "losses": [[step, _to_finite(loss)] for step, loss in best.evaluations],
        "first_step": None if best.first is None else best.first.step,
        "best_step": None if lowest is None else lowest.step,
        "best_loss": None if lowest is None else lowest.loss,
        "last_loss": _to_finite(best.evaluations[-1].loss),
        "kept": "best" if best.keep and lowest is not None else "last",
        "kept_step": kept.step,
    }


def _to_finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _make_deferred(session: Session) -> dict[str, Any]:
    """Make the module's arguments for an operation that training decides on."""
    if session.deferred is None:
        return {}
    deferred = {
        "operation": session.deferred.to_json(),
        "importance": _to_plain(session.run.importance),
        "seed": session.run.seed,
        "native": session.run.export.format is ExportFormat.native,
    }
    # The first table is of the model with all its heads.
    scorer = keep_tables(session, make_scorer(session), first=True)
    return {"deferred": deferred, "scorer": scorer}


def build_module(run: RunConfig, source: ModelSource, plan: Plan, **more: Any) -> SurgeryModule:
    """Make the LightningModule of a run; Lightning builds its model by `configure_model`.

    Args:
        more: further arguments of `SurgeryModule`.
    """
    pairs = pair_with_teacher(run, source.load_config(), plan)
    return SurgeryModule(
        model=_to_plain(run.model),
        model_config=plain_config(source.load_config()),
        plan=plan.to_json(),
        objective=_to_plain(run.objective),
        optim=_to_plain(run.optim),
        tensors=plan.tensors,
        pairs=None if pairs is None else [list(pair) for pair in pairs],
        **more,
    )


def _to_plain(spec: Any) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(spec).items()}


def _count_tokens(curve: LossCurve, trainer: pl.Trainer) -> int:
    """Count the tokens of all processes."""
    mine = torch.tensor(
        float(curve.tokens), dtype=torch.float64, device=trainer.strategy.root_device
    )
    return int(trainer.strategy.reduce(mine, reduce_op="sum"))


def _name_data(run: RunConfig) -> str:
    where = run.data.path
    names = [] if where is None else [where] if isinstance(where, str) else list(where)
    return ": ".join([run.data.kind.value, *([", ".join(map(str, names))] if names else [])])


def _to_float(value: Any) -> float | None:
    return float(value) if value is not None else None


def _find_checkpoint(trainer: pl.Trainer) -> str | None:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return os.path.relpath(path, trainer.default_root_dir) if path else None


def _find_heads_table(trainer: pl.Trainer) -> str | None:
    """Find the table that this training's `HeadTable` wrote, if it is in the run directory."""
    root = Path(trainer.default_root_dir).absolute()
    tables = [getattr(c, "heads_file", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    written = [file.absolute() for file in tables if file is not None]
    inside = [file.relative_to(root) for file in written if file.is_relative_to(root)]
    return inside[0].as_posix() if inside else None
