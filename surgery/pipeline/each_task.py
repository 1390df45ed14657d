"""One run per task from one base: prune heads, or train output projections, for each task."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from surgery.config.schema import DataConfig, RunConfig, TaskMode
from surgery.console import print_heading, say
from surgery.files import write_text
from surgery.lab.tasks import OutputProjections
from surgery.lab.tasks.declare import BASE, ORIGINAL, naming_task
from surgery.models.source import ModelSource
from surgery.pipeline.files import CONFIG, EXPORT, PROJECTIONS, TASK_RUNS
from surgery.pipeline.prepare import prepare
from surgery.pipeline.session import Prepared, Session
from surgery.pipeline.stages import begin, finish, run_stages
from surgery.plan.operation import Operation


@dataclass
class TaskRuns:
    """A run that consists of one run per task.

    Attributes:
        session: of the whole, for its plan and its results.
        parts: the run of each task.
    """

    session: Session
    parts: dict[str, Session]


def prepare_each(
    run: RunConfig,
    run_dir: Path,
    settings: dict[str, Any],
    operations: Sequence[Operation],
    tasks: Mapping[str, DataConfig],
) -> TaskRuns:
    """Prepare the same run on the data of each task.

    Raises:
        ConfigError: the first problem that is found in any of them.
    """
    none = replace(run.tasks, data=None, mode=TaskMode.compare)
    parts = {}
    for name, cfg in tasks.items():
        folder = run_dir / TASK_RUNS / name
        callbacks = _move_paths(run.callbacks, str(run_dir), str(folder))
        own = {"data": _to_plain(cfg), "tasks": _to_plain(none), "callbacks": callbacks}
        part = replace(run, data=cfg, tasks=none, callbacks=callbacks, run_dir=str(folder))
        with naming_task(name):
            own = settings | own | {"run_dir": str(folder)}
            parts[name] = prepare(part, folder, own, operations, {})
    first = next(iter(parts.values())).prepared
    prepared = Prepared(first.source, operations, first.planning, first.plan)
    return TaskRuns(Session(run, settings, run_dir, prepared, first.plan), parts)


def run_each(runs: TaskRuns, start: float) -> None:
    """Run one task after the other, then measure each task's model on each task's text.

    Args:
        start: when the whole began, by `time.perf_counter`.
    """
    session, parts = runs.session, runs.parts
    begin(session)
    projected = session.run.tasks.mode is TaskMode.output_projections
    base = OutputProjections(session.source.load()) if projected else None
    for name, part in parts.items():
        print_heading(f"task {name}")
        part.run_dir.mkdir(parents=True, exist_ok=True)
        write_text(part.run_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(part.settings)))
        run_stages(part, time.perf_counter())
        session.results.timings[f"task {name}"] = part.results.timings["total"]
        if base is not None:
            _keep_projections(session.run_dir, part, name, base)
        if base is not None or part.results.export:
            part.model = None  # it is on disk
    models = _load_pruned(runs) if base is None else _switch_projections(runs, base)
    with session.time_stage("losses of all tasks"):
        losses = _measure_losses(runs, models)
    files = {name: _name_projections(name) if projected else _name_export(name) for name in parts}
    session.results.tasks |= {"losses": losses, "files": files}
    finish(session, start)


def _measure_losses(
    runs: TaskRuns, models: Iterator[tuple[str, str, PreTrainedModel]]
) -> dict[str, dict[str, float]]:
    """Measure model → task → held-out loss, for `models` of (name, label, model)."""
    from surgery.lab.tasks.losses import measure_task_losses  # seconds, for datasets and Lightning

    session = runs.session
    data = {name: part.data for name, part in runs.parts.items()}
    return {
        name: measure_task_losses(model.to(session.device), data, session.run, label)  # type: ignore[arg-type]
        for name, label, model in models
    }


def _name_projections(task: str) -> str:
    return f"{PROJECTIONS}/{task}.safetensors"


def _name_export(task: str) -> str:
    return f"{TASK_RUNS}/{task}/{EXPORT}"


def _keep_projections(run_dir: Path, part: Session, name: str, base: OutputProjections) -> None:
    assert part.model is not None
    path = run_dir / _name_projections(name)
    path.parent.mkdir(exist_ok=True)
    base.save(path, part.model, part.source.name)
    base.add(name, path)
    say(f"  {path}: {path.stat().st_size / 1e6:.1f} MB")


def _load_pruned(runs: TaskRuns) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """Load the original, and each task's model from its export."""
    run, run_dir = runs.session.run, runs.session.run_dir
    yield ORIGINAL, ORIGINAL, runs.session.source.load()
    for name, part in runs.parts.items():
        model = part.model
        if model is None:
            spec = replace(run.model, path=str(run_dir / _name_export(name)), revision=None)
            model = ModelSource(spec).load()
        yield name, f"pruned for {name}", model


def _switch_projections(
    runs: TaskRuns, base: OutputProjections
) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """Yield one model with the output projections of each task in turn."""
    yield BASE, BASE, base.model
    for name in runs.parts:
        base.use(name)
        yield name, f"projections of {name}", base.model
    base.use(None)


def _move_paths(value: Any, old: str, new: str) -> Any:
    """Move every path in plain data from one directory to another."""
    if isinstance(value, Mapping):
        return {key: _move_paths(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_move_paths(one, old, new) for one in value]
    below = isinstance(value, str) and value.startswith(f"{old}/")
    return f"{new}{value.removeprefix(old)}" if below else value


def _to_plain(section: Any) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)
