"""A run per task from one base: heads pruned for each, or output projections trained for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from surgery.config.schema import DataConfig, RunConfig, TaskMode
from surgery.console import print_heading, say
from surgery.files import write_text
from surgery.lab.tasks import OutputProjections
from surgery.lab.tasks.declare import BASE, ORIGINAL, of_task
from surgery.lab.tasks.losses import task_losses
from surgery.models.source import ModelSource
from surgery.pipeline.session import Session

# Where in the run directory each task has its own, and where their projections are.
RUNS = "tasks"
PROJECTIONS = "projections"


def prepare_each(
    run: RunConfig, run_dir: Path, settings: dict[str, Any], tasks: Mapping[str, DataConfig]
) -> Session:
    """A session that holds one per task: the same run on its data, checked as any other.

    Raises:
        ConfigError: the first thing that stands in the way of any of them.
    """
    from surgery.pipeline.prepare import prepare

    none = replace(run.tasks, data=None, mode=TaskMode.compare)
    runs = {}
    for name, cfg in tasks.items():
        where = run_dir / RUNS / name
        callbacks = _moved(run.callbacks, str(run_dir), str(where))
        own = {"data": _plain(cfg), "tasks": _plain(none), "callbacks": callbacks}
        part = replace(run, data=cfg, tasks=none, callbacks=callbacks, run_dir=str(where))
        with of_task(name):
            runs[name] = prepare(part, where, settings | own | {"run_dir": str(where)})
    first = next(iter(runs.values()))
    return Session(
        run=run,
        settings=settings,
        run_dir=run_dir,
        source=first.source,
        plan=first.plan,
        task_runs=runs,
    )


def run_each(session: Session) -> None:
    """One run after the other, then the losses of each task's model on each task's text."""
    from surgery.pipeline.run import perform

    projected = session.run.tasks.mode is TaskMode.output_projections
    base = OutputProjections(session.source.load()) if projected else None
    for name, part in session.task_runs.items():
        print_heading(f"task {name}")
        part.run_dir.mkdir(parents=True, exist_ok=True)
        write_text(part.run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(part.settings)))
        perform(part, time.perf_counter())
        session.timings[f"task {name}"] = part.timings["total"]
        if base is not None:
            _keep_projections(session, name, base)
        if base is not None or part.export:
            part.model = None  # what is needed of it is on disk
    with session.stage("losses of all tasks"):
        data = {name: part.data for name, part in session.task_runs.items() if part.data}
        models = _pruned(session) if base is None else _projected(session, base)
        losses = {
            under: task_losses(model.to(session.device), data, session.run, label)  # type: ignore[arg-type]
            for under, label, model in models
        }
    files = _projection_file if projected else _export_folder
    session.tasks |= {"losses": losses, "files": {name: files(name) for name in data}}


def _projection_file(name: str) -> str:
    return f"{PROJECTIONS}/{name}.safetensors"


def _export_folder(name: str) -> str:
    return f"{RUNS}/{name}/export"


def _keep_projections(session: Session, name: str, base: OutputProjections) -> None:
    trained = session.task_runs[name].model
    assert trained is not None
    path = session.run_dir / _projection_file(name)
    path.parent.mkdir(exist_ok=True)
    base.save(path, trained, session.source.name)
    base.add(name, path)
    say(f"  {path}: {path.stat().st_size / 1e6:.1f} MB")


def _pruned(session: Session) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """The original, and each task's model as its export reloads."""
    yield ORIGINAL, ORIGINAL, session.source.load()
    for name, part in session.task_runs.items():
        model = part.model
        if model is None:
            spec = replace(
                session.run.model, path=str(session.run_dir / _export_folder(name)), revision=None
            )
            model = ModelSource(spec).load()
        yield name, f"pruned for {name}", model


def _projected(
    session: Session, base: OutputProjections
) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """One model, its output projections switched."""
    yield BASE, BASE, base.model
    for name in session.task_runs:
        base.use(name)
        yield name, f"projections of {name}", base.model
    base.use(None)


def _moved(value: Any, old: str, new: str) -> Any:
    """Plain data, with every path below one directory put below another."""
    if isinstance(value, Mapping):
        return {key: _moved(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, old, new) for one in value]
    below = isinstance(value, str) and value.startswith(f"{old}/")
    return f"{new}{value.removeprefix(old)}" if below else value


def _plain(section: Any) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)
