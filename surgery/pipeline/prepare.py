"""Everything that can be refused, refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from surgery.config.schema import (
    Dtype,
    ExportFormat,
    Layout,
    ObjectiveName,
    OptimizerName,
    RunConfig,
    Stage,
    Task,
)
from surgery.console import is_terminal
from surgery.errors import ConfigError
from surgery.importance.work import check_estimator
from surgery.lab.tasks.declare import EACH, check_tasks
from surgery.models.sites import get_text_config
from surgery.models.source import ModelSource
from surgery.pipeline.deferred import Deferred, split_deferred
from surgery.pipeline.log import is_logged
from surgery.pipeline.session import Session, device_name
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations

_WEIGHTS = {Stage.measure, Stage.score, Stage.analyze, Stage.operate, Stage.train, Stage.export}
_DATA = {Stage.measure, Stage.score, Stage.analyze, Stage.train}

# Times 1 / hidden_size: the width rule of Yang et al. 2022 (arXiv:2203.03466) for Adam, anchored
# where healing the embedded model went best.
HEALING_RATE = 0.75


def prepare(run: RunConfig, run_dir: Path, settings: dict[str, Any]) -> Session:
    """Check the whole run and make its plan.

    Args:
        run: the typed config.
        run_dir: where results will go.
        settings: the config as plain data, for loggers and cards.

    Raises:
        ConfigError: the first thing that stands in its way.
    """
    if not is_terminal():
        transformers.utils.logging.disable_progress_bar()
    wanted = set(run.stages)
    _check_stages(run, wanted)
    operations = parse_operations(run.attention)
    early, late = split_deferred(operations)
    for operation in operations:
        operation.check_run(run)
    source = ModelSource(run.model)
    _check_device(run.model.device)
    tasks = check_tasks(run, operations)
    if tasks and run.tasks.mode in EACH:
        from surgery.pipeline.each_task import prepare_each

        return prepare_each(run, run_dir, settings, tasks)
    config = source.load_config()
    if run.optim.lr is None and Stage.train in wanted:
        run.optim.lr = _healing_rate(config)
    calibrates = Stage.calibrate in wanted and (
        run.calibration.compare or any(operation.calibrated for operation in operations)
    )
    _check_estimators(run, operations)
    if wanted & _DATA or calibrates:
        from surgery.data.sources import check_source

        check_source(run.data)
    if is_logged(wanted):
        from surgery.training.loggers import check_loggers

        check_loggers(run.logger)
    skeleton = source.build_meta_model(config)
    if Stage.analyze in wanted:
        from surgery.pipeline.analysis import check_analysis

        check_analysis(run.analysis, skeleton)
    making: dict[str, Any] = {
        "name": source.name,
        "seed": run.seed,
        "tokens": run.data.seq_len,
        "kv_bytes": _kv_bytes(run, config),
        "device": device_name(run.model.device),
        "native": run.export.format is ExportFormat.native,
    }
    whole = plan = make_plan(skeleton, operations, **making)
    if late is not None:  # `whole` was made to refuse what cannot be; training will decide on it
        plan = make_plan(skeleton, early, **making)
    _check_calibrated(run, plan, wanted)
    if wanted & _WEIGHTS or calibrates:
        source.check_weights()
    if Stage.train in wanted:
        from surgery.pipeline.healing import check_healing

        check_healing(run, skeleton, plan, changes=whole.changes_anything)
    session = Session(run=run, settings=settings, run_dir=run_dir, source=source, plan=plan)
    if late is not None:
        session.deferred = Deferred(late, whole)
    if wanted & (_DATA | {Stage.export}) or calibrates:
        session.tokenizer = source.load_tokenizer()
    if Stage.train in wanted:
        from surgery.training.trainer import build_callbacks, build_trainer

        session.callbacks = build_callbacks(run.callbacks)
        # Thrown away: what Lightning would refuse, it refuses before anything is measured.
        build_trainer(dict(run.trainer), run_dir=run_dir, callbacks=session.callbacks, loggers=[])
    if wanted & _DATA or calibrates:
        import datasets

        from surgery.data.module import TextData

        if not is_terminal():
            datasets.disable_progress_bars()
        assert session.tokenizer is not None
        check_fit(run, config, whole)
        session.data = TextData(run.data, session.tokenizer, run.model.task, run.seed)
        session.data.setup()
        if Stage.train in wanted:
            session.data.check_training()
    if tasks:
        from surgery.pipeline.tasks import prepare_tasks

        prepare_tasks(session, tasks)
    return session


def _check_estimators(run: RunConfig, operations: Sequence[Operation]) -> None:
    """Of the stage `score`, and of every operation that has heads scored, whenever it does."""
    asked = {
        operation.key("estimator"): operation.scored_by
        for operation in operations
        if operation.scored_by is not None
    }
    if Stage.score in run.stages:
        asked["importance.estimator"] = run.importance.estimator
    for key, estimator in asked.items():
        check_estimator(key, estimator, run.importance.objective)


def _check_calibrated(run: RunConfig, plan: Plan, wanted: set[Stage]) -> None:
    if plan.open_decisions and Stage.operate in wanted and Stage.calibrate not in wanted:
        raise ConfigError(
            "stages",
            f"`operate` needs `calibrate` before it: {plan.open_decisions[0]}",
            given=[stage.value for stage in run.stages],
            valid="add `calibrate`",
        )


def check_writable(run_dir: Path) -> None:
    """Hydra has made the directory by now; it may still be on a read-only file system."""
    if not os.access(run_dir, os.W_OK):
        raise ConfigError("hydra.run.dir", "cannot be written to", given=str(run_dir))


def _check_stages(run: RunConfig, wanted: set[Stage]) -> None:
    changing = wanted & {Stage.train, Stage.export}
    if run.attention and changing and Stage.operate not in wanted:
        raise ConfigError(
            "stages",
            f"attention.{next(iter(run.attention))} is declared, but never performed",
            given=[stage.value for stage in run.stages],
            valid="add `operate`, or attention=[]",
        )
    if run.resume is not None:
        if Stage.train not in wanted:
            raise ConfigError(
                "resume", "there is nothing to resume without the stage `train`", given=run.resume
            )
        if not Path(run.resume).is_file():
            raise ConfigError("resume", "there is no such checkpoint", given=run.resume)
    distilled = Stage.train in wanted and run.objective.name is ObjectiveName.distill
    if distilled and run.model.scratch is not None and run.objective.teacher is None:
        raise ConfigError(
            "objective",
            "random weights teach nothing",
            given="distill",
            valid="objective=lm, a model.path, or an objective.teacher",
        )
    if distilled and run.model.num_labels == 1:
        raise ConfigError(
            "objective",
            "one label alone is a regression: there is no distribution to learn from",
            given="distill",
            valid="objective=lm",
        )
    sharded = str(run.trainer.get("strategy")).startswith(("fsdp", "deepspeed"))
    if sharded and Stage.train in wanted and run.optim.name is OptimizerName.muon:
        raise ConfigError(
            "optim",
            "Muon needs whole matrices, and this strategy shards them",
            given="muon",
            valid="optim=adamw",
        )


def _healing_rate(config: Any) -> float:
    width = getattr(get_text_config(config), "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            "optim.lr", "a value is required: the model's config states no hidden_size to go by"
        )
    return HEALING_RATE / width


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "model.device", str(error).splitlines()[0], given=device, valid="auto, cpu, cuda, …"
        ) from None


def check_fit(run: RunConfig, config: Any, plan: Plan) -> None:
    """Refuse data that the model cannot read.

    Raises:
        ConfigError: windows or batches it has no place for.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for key, value in plan.config_patch.items():
        if key.endswith("max_position_embeddings"):
            limit = value
    if isinstance(limit, int) and run.data.seq_len > limit:
        raise ConfigError(
            "data.seq_len",
            "is longer than the model's positions",
            given=run.data.seq_len,
            valid=f"2 to {limit}",
        )
    data = run.data
    implementation = plan.implementation or run.model.attn_implementation
    flash = "flash" in str(implementation)
    if flash and data.isolate_documents and data.layout is Layout.packed and data.batch_size > 1:
        raise ConfigError(
            "data.isolate_documents",
            "transformers keeps packed documents apart under flash only in batches of one",
            given=f"data.batch_size={data.batch_size}, {implementation}",
            valid="data.batch_size=1, isolate_documents=false, or model.attn_implementation=sdpa",
        )
    if run.model.task is Task.sequence_classification and config.pad_token_id is None:
        raise ConfigError(
            "model.task",
            "sequence_classification pads its batches, and this model has no pad token",
            given=run.model.path,
            valid="a model whose config.json has a pad_token_id",
        )


def _kv_bytes(run: RunConfig, config: Any) -> int:
    dtype = run.model.dtype
    if dtype is Dtype.auto:
        stored = getattr(config, "dtype", None)
        return stored.itemsize if isinstance(stored, torch.dtype) else 4
    return int(getattr(torch, dtype.value).itemsize)
