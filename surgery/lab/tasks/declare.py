"""The tasks that a config declares, and what of them makes no sense."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from surgery.config.schema import Combine, DataConfig, RunConfig, Stage, TaskMode, Trained
from surgery.config.validate import change_data, check_values
from surgery.errors import ConfigError
from surgery.plan.registry import list_operations, list_options

# Modes that train a model per task, in runs of their own.
EACH = (TaskMode.prune_each, TaskMode.output_projections)
# What the losses of tasks are listed under, beside the tasks' names.
NO_MASK, ORIGINAL, BASE = "no mask", "original", "base"
_TAKEN = {ORIGINAL, BASE, "before", "after_surgery", "after_training"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def declared(run: RunConfig) -> dict[str, DataConfig]:
    """The data of each task: the run's own, with the keys of `tasks.data.NAME` changed.

    Raises:
        ConfigError: a name that is none, or data that cannot be.
    """
    from surgery.data.sources import check_source  # `datasets` takes seconds to import

    found = {}
    for name, changes in (run.tasks.data or {}).items():
        if not _NAME.fullmatch(str(name)) or name in _TAKEN:
            raise ConfigError(
                "tasks.data",
                "is no name for a task",
                given=name,
                valid=f"letters, digits, _ and -; none of {', '.join(sorted(_TAKEN))}",
            )
        if not isinstance(changes, Mapping):
            raise ConfigError(
                f"tasks.data.{name}",
                "a task is what differs in its data",
                given=changes,
                valid="keys of data, e.g. {part: code}",
            )
        with of_task(str(name)):
            found[str(name)] = change_data(run.data, changes)
            check_values(replace(run, data=found[str(name)]))
            check_source(found[str(name)])
    return found


@contextmanager
def of_task(name: str) -> Iterator[None]:
    """Whatever is wrong with `data` is wrong with the data of this task."""
    try:
        yield
    except ConfigError as error:
        if error.key.partition(".")[0] != "data":
            raise
        key = f"tasks.data.{name}{error.key.removeprefix('data')}"
        raise ConfigError(key, error.problem, given=error.given, valid=error.valid) from None


def check_tasks(run: RunConfig, operations: Sequence[Any]) -> dict[str, DataConfig]:
    """Refuse what cannot be done with the tasks; the data of each. Empty where there are none.

    Raises:
        ConfigError: a mode without what it needs, or an option that it would not look at.
    """
    tasks, mode = run.tasks, run.tasks.mode
    if not tasks.data:
        if mode is not TaskMode.compare or tasks.weights is not None:
            key = "tasks.weights" if mode is TaskMode.compare else "tasks.mode"
            raise ConfigError(
                key,
                "there are no tasks",
                given=mode.value,
                valid="tasks.data={NAME: {KEY: VALUE}, …}",
            )
        return {}
    if len(tasks.data) < 2:
        raise ConfigError(
            "tasks.data",
            "one task alone has nothing to agree or disagree with",
            given=", ".join(map(str, tasks.data)),
            valid="two tasks or more",
        )
    found = declared(run)
    _check_weights(run)
    if mode is TaskMode.compare:
        _need(run, Stage.score, "tasks are compared by the scores of their heads")
    elif mode is TaskMode.output_projections:
        _check_projections(run)
    else:
        _check_pruning(run, operations)
    if mode in EACH:
        _check_each(run)
    return found


def _check_weights(run: RunConfig) -> None:
    tasks, names, key = run.tasks, list(run.tasks.data or {}), "tasks.weights"
    if tasks.weights is None:
        return
    if tasks.mode is not TaskMode.one_mask or tasks.combine is not Combine.weighted:
        raise ConfigError(
            key,
            "are of no use here",
            given=dict(tasks.weights),
            valid="null, or tasks.mode=one_mask tasks.combine=weighted",
        )
    for name, weight in tasks.weights.items():
        if name not in names:
            raise ConfigError(f"{key}.{name}", "there is no such task", valid=names)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ConfigError(f"{key}.{name}", "is no weight", given=weight, valid="0 or more")
    for name in names:
        if name not in tasks.weights:
            raise ConfigError(f"{key}.{name}", "a value is required here", valid="0 or more")
    if not any(tasks.weights.values()):
        raise ConfigError(key, "leave no task that counts", given=dict(tasks.weights))


def _check_pruning(run: RunConfig, operations: Sequence[Any]) -> None:
    found = [operation for operation in operations if operation.scored_by is not None]
    if not found:
        raise ConfigError(
            "tasks.mode",
            "needs heads that are pruned by an estimator",
            given=run.tasks.mode.value,
            valid=[
                f"attention=[{name}] with attention.{name}.estimator"
                for name in list_operations()
                if "estimator" in list_options(name)
            ],
        )
    if not found[0].deferred:
        _need(run, Stage.calibrate, "heads are chosen there")
    _need(run, Stage.operate, "heads are pruned there")


def _check_projections(run: RunConfig) -> None:
    if run.attention:
        raise ConfigError(
            "attention",
            "output projections are trained for the model as it is",
            given=", ".join(run.attention),
            valid="attention=[], and the export of an earlier run",
        )
    if run.optim.parameters is not Trained.output:
        raise ConfigError(
            "optim.parameters",
            "only output projections are kept per task",
            given=run.optim.parameters.value,
            valid=Trained.output.value,
        )
    _need(run, Stage.train, "each task trains its own")
    if Stage.export in run.stages:
        raise ConfigError(
            "stages",
            "there is nothing to export: the model stays as it is, and projections/ "
            "holds what each task trained",
            given="export",
            valid="the stages without it",
        )


def _check_each(run: RunConfig) -> None:
    mode = run.tasks.mode.value
    if run.model.scratch is not None:
        raise ConfigError(
            "model.scratch",
            f"tasks.mode={mode} loads its model several times, and "
            "random weights are others each time",
            valid="a model.path",
        )
    if run.resume is not None:
        raise ConfigError(
            "resume", f"tasks.mode={mode} trains once per task", given=run.resume, valid="null"
        )
    wanted = {"devices": (None, 1, "1", [0]), "num_nodes": (None, 1), "strategy": (None, "auto")}
    for key, valid in wanted.items():
        if Stage.train in run.stages and run.trainer.get(key) not in valid:
            raise ConfigError(
                f"trainer.{key}",
                f"tasks.mode={mode} trains in one process",
                given=run.trainer[key],
                valid=str(valid[1]),
            )


def _need(run: RunConfig, stage: Stage, why: str) -> None:
    if stage not in run.stages:
        raise ConfigError(
            "stages",
            f"tasks.mode={run.tasks.mode.value} needs `{stage.value}`: {why}",
            given=[s.value for s in run.stages],
            valid=f"add `{stage.value}`",
        )
