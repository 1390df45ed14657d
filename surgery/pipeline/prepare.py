"""Prepare a run: check everything that can be checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

from surgery.config.schema import DataConfig, DataKind, Dtype, ExportFormat, RunConfig, Stage
from surgery.console import is_terminal, say
from surgery.lab.tasks.declare import naming_task
from surgery.models.source import ModelSource
from surgery.pipeline.check import check_calibrated, check_fit, check_tokenizer
from surgery.pipeline.healing import check_healing
from surgery.pipeline.log import is_logged
from surgery.pipeline.packing import check_packing
from surgery.pipeline.resume import check_resume
from surgery.pipeline.session import Prepared, Session, resolve_device
from surgery.plan.amount import count_windows
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.training.rate import compute_full_rate
from surgery.training.teacher import check_teacher_tokens

if TYPE_CHECKING:
    from surgery.data.module import TextData

_WEIGHTS = {Stage.measure, Stage.score, Stage.analyze, Stage.operate, Stage.train, Stage.export}
_DATA = {Stage.measure, Stage.score, Stage.analyze, Stage.train}


def prepare(
    run: RunConfig,
    run_dir: Path,
    settings: dict[str, Any],
    operations: Sequence[Operation],
    tasks: Mapping[str, DataConfig],
) -> Session:
    """Check a run against its model and its data, and make its plan.

    Args:
        run: the typed config, after `check_run`.
        run_dir: where results will go.
        settings: the config as plain data, for loggers.
        operations: of the run.
        tasks: the data of each task, where this run is about several.

    Raises:
        ConfigError: the first problem that is found.
    """
    if not is_terminal():
        transformers.utils.logging.disable_progress_bar()
    wanted = set(run.stages)
    calibrates = Stage.calibrate in wanted and (
        run.calibration.compare or any(operation.calibrated for operation in operations)
    )
    reads_data = calibrates or bool(wanted & _DATA)
    source = ModelSource(run.model)
    config = source.load_config()
    if run.optim.lr is None and Stage.train in wanted:
        compute_full_rate(config)  # refused now, chosen when it is known what surgery cost
    _check_sources(run, reads_data)
    skeleton = source.build_meta_model(config)
    source.check_shapes(skeleton)
    if Stage.analyze in wanted:
        from surgery.pipeline.analyze import check_analysis  # seconds, for matplotlib and scipy

        check_analysis(run.analysis, skeleton)
    planning: dict[str, Any] = {
        "name": source.name,
        "seed": run.seed,
        "tokens": run.plan.tokens or run.data.seq_len,
        "kv_bytes": _size_kv_value(run, config),
        "device": resolve_device(run.model.device),
        "native": run.export.format is ExportFormat.native,
    }
    whole = plan = make_plan(skeleton, operations, **planning)
    if run.export.tensor_parallel is not None:
        whole.check_tensor_parallel(run.export.tensor_parallel)
    if operations and operations[-1].deferred:  # `whole` is made to check all operations
        plan = make_plan(skeleton, operations[:-1], **planning)
    check_calibrated(run, plan)
    if run.resume is not None:
        done = operations[:-1] if operations and operations[-1].deferred else operations
        check_resume(run, config, done)
    if calibrates or wanted & _WEIGHTS:
        source.check_weights()
    if Stage.train in wanted:
        check_healing(run, skeleton, plan, changes=whole.changes_anything)
    session = Session(run, settings, run_dir, Prepared(source, operations, planning, whole), plan)
    if reads_data or tasks or Stage.export in wanted:
        session.prepared.tokenizer = source.load_tokenizer()
        check_tokenizer(run, session.tokenizer, skeleton)
        if Stage.export in wanted:
            session.prepared.loaded_tokenizer = copy.deepcopy(session.prepared.tokenizer)
    if Stage.train in wanted and run.objective.teacher is not None:
        check_teacher_tokens(run.model, run.objective.teacher, session.tokenizer)
    if Stage.train in wanted:
        _build_callbacks(session)
    if reads_data:
        _read_data(session, skeleton)
    if tasks:
        _read_tasks(session, skeleton, tasks)
    return session


def _check_sources(run: RunConfig, reads_data: bool) -> None:
    """Check where data comes from and where results are logged."""
    if reads_data:
        from surgery.data.sources import check_source  # seconds, for datasets

        check_source(run.data)
    if is_logged(set(run.stages)):
        from surgery.training.loggers import check_loggers  # seconds, for Lightning

        check_loggers(run.logger)


def _size_kv_value(run: RunConfig, config: Any) -> int:
    """Find how many bytes a cached value takes."""
    dtype = run.model.dtype
    if dtype is Dtype.auto:
        stored = getattr(config, "dtype", None)
        return stored.itemsize if isinstance(stored, torch.dtype) else 4
    return int(getattr(torch, dtype.value).itemsize)


def _build_callbacks(session: Session) -> None:
    from surgery.training.trainer import build_callbacks, build_trainer  # seconds, for Lightning

    run, callbacks = session.run, build_callbacks(session.run.callbacks)
    # Not kept: built so that Lightning raises its errors before anything is measured.
    build_trainer(dict(run.trainer), run_dir=session.run_dir, callbacks=callbacks, loggers=[])
    session.prepared.callbacks = callbacks


def _read_data(session: Session, skeleton: PreTrainedModel) -> None:
    import datasets  # seconds, as does what uses it

    if not is_terminal():
        datasets.disable_progress_bars()
    run = session.run
    data = _make_data(run, run.data, session, skeleton)
    data.needs_held_out = session.has(Stage.measure) or session.has(Stage.train)
    data.setup()
    if session.has(Stage.train):
        data.check_training()
    session.prepared.data = data
    _say_few_windows(session, data)


def _make_data(
    run: RunConfig, cfg: DataConfig, session: Session, skeleton: PreTrainedModel
) -> TextData:
    from surgery.data.module import TextData  # seconds, for datasets and Lightning
    from surgery.data.own_text import OwnText, check_cache

    check_fit(replace(run, data=cfg), skeleton.config, session.whole_plan)
    check_packing(run, cfg, skeleton, session.whole_plan)
    task, own = run.model.task, None
    if cfg.kind is DataKind.self:
        scratch = run.model.scratch is not None
        own = OwnText(cfg, session.tokenizer, skeleton.config, task, scratch=scratch)
        check_cache()
    return TextData(cfg, session.tokenizer, task, run.seed, own)


def _say_few_windows(session: Session, data: TextData) -> None:
    """Say where a stage looks at fewer windows than it is asked to, since there are no more."""
    run, train = session.run, data.count_training_rows()
    asked = count_windows(run.calibration.windows, session.plan.source, run.data.seq_len)
    scored = any(operation.scored_by for operation in session.immediate)
    wanted = {
        "calibration.windows": (session.has(Stage.calibrate), asked, train),
        "importance.windows": (session.has(Stage.score) or scored, run.importance.windows, train),
        "analysis.windows": (session.has(Stage.analyze), run.analysis.windows, train),
        "measure.windows": (
            session.has(Stage.measure),
            run.measure.windows,
            data.count_held_out_rows(),
        ),
    }
    for key, (used, windows, there) in wanted.items():
        if used and there is not None and there < windows:
            half = "held-out" if key == "measure.windows" else "training"
            say(f"  {key}={windows}: the {half} text has {there}, and these are used")
    if not data.needs_held_out and not data.count_held_out_rows():
        say("  no text is held out: nothing says how well the result does on text it has not seen")


def _read_tasks(
    session: Session, skeleton: PreTrainedModel, tasks: Mapping[str, DataConfig]
) -> None:
    for name, cfg in tasks.items():
        with naming_task(name):
            data = _make_data(session.run, cfg, session, skeleton)
            data.setup()
        session.prepared.task_data[name] = data
