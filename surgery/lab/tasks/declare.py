"""Parse and check the tasks that a config declares."""

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

# Modes that train a model per task, each in its own run.
EACH = (TaskMode.prune_each, TaskMode.output_projections)
# Names of lists of losses, besides the names of tasks.
NO_MASK, ORIGINAL, BASE = "no mask", "original", "base"
_TAKEN = {ORIGINAL, BASE, "before", "after_surgery", "after_training"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def parse_tasks(run: RunConfig) -> dict[str, DataConfig]:
    """Parse the data of each task: the run's own data, with the keys of `tasks.data.NAME` changed.

    Raises:
        ConfigError: a name or the data is invalid.
    """
    from surgery.data.sources import check_source  # `datasets` takes seconds to import

    tasks = {}
    for name, changes in (run.tasks.data or {}).items():
        if not _NAME.fullmatch(str(name)) or name in _TAKEN:
            raise ConfigError(
                "tasks.data",
                "is not a valid name for a task",
                given=name,
                valid=f"letters, digits, _ and -; but not {', '.join(sorted(_TAKEN))}",
            )
        if not isinstance(changes, Mapping):
            raise ConfigError(
                f"tasks.data.{name}",
                "must be the keys of data that differ for this task",
                given=changes,
                valid="keys of data, e.g. {part: code}",
            )
        with naming_task(str(name)):
            tasks[str(name)] = change_data(run.data, changes)
            check_values(replace(run, data=tasks[str(name)]))
            check_source(tasks[str(name)])
    return tasks


@contextmanager
def naming_task(name: str) -> Iterator[None]:
    """Turn an error about `data` into one about the data of this task."""
    try:
        yield
    except ConfigError as error:
        if error.key.partition(".")[0] != "data":
            raise
        key = f"tasks.data.{name}{error.key.removeprefix('data')}"
        raise ConfigError(key, error.problem, given=error.given, valid=error.valid) from None


def check_tasks(run: RunConfig, operations: Sequence[Any]) -> dict[str, DataConfig]:
    """Check the tasks, and return the data of each; empty if there are no tasks.

    Raises:
        ConfigError: the mode lacks something that it needs, or an option has no effect.
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
            "there must be at least two tasks",
            given=", ".join(map(str, tasks.data)),
            valid="two tasks or more",
        )
    data_of_task = parse_tasks(run)
    _check_weights(run)
    if mode is TaskMode.compare:
        _require_stage(run, Stage.score, "tasks are compared by the scores of their heads")
    elif mode is TaskMode.output_projections:
        _check_projections(run)
    else:
        _check_pruning(run, operations)
    if mode in EACH:
        _check_each(run)
    return data_of_task


def _check_weights(run: RunConfig) -> None:
    tasks, names, key = run.tasks, list(run.tasks.data or {}), "tasks.weights"
    if tasks.weights is None:
        return
    if tasks.mode is not TaskMode.one_mask or tasks.combine is not Combine.weighted:
        raise ConfigError(
            key,
            "have no effect here",
            given=dict(tasks.weights),
            valid="null, or tasks.mode=one_mask tasks.combine=weighted",
        )
    for name, weight in tasks.weights.items():
        if name not in names:
            raise ConfigError(f"{key}.{name}", "there is no such task", valid=names)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ConfigError(f"{key}.{name}", "must be 0 or more", given=weight, valid="0 or more")
    for name in names:
        if name not in tasks.weights:
            raise ConfigError(f"{key}.{name}", "a value is required here", valid="0 or more")
    if not any(tasks.weights.values()):
        raise ConfigError(key, "must not all be 0", given=dict(tasks.weights))


def _check_pruning(run: RunConfig, operations: Sequence[Any]) -> None:
    pruning = [operation for operation in operations if operation.scored_by is not None]
    if not pruning:
        raise ConfigError(
            "tasks.mode",
            "needs an operation that prunes heads by an estimator",
            given=run.tasks.mode.value,
            valid=[
                f"attention=[{name}] with attention.{name}.estimator"
                for name in list_operations()
                if "estimator" in list_options(name)
            ],
        )
    if not pruning[0].deferred:
        _require_stage(run, Stage.calibrate, "heads are chosen there")
    _require_stage(run, Stage.operate, "heads are pruned there")


def _check_projections(run: RunConfig) -> None:
    if run.attention:
        raise ConfigError(
            "attention",
            "output projections are trained for the unchanged model",
            given=", ".join(run.attention),
            valid="attention=[], and the export of an earlier run",
        )
    if run.optim.parameters is not Trained.output:
        raise ConfigError(
            "optim.parameters",
            "must be output: only output projections are kept per task",
            given=run.optim.parameters.value,
            valid=Trained.output.value,
        )
    _require_stage(run, Stage.train, "each task trains its own")
    if Stage.export in run.stages:
        raise ConfigError(
            "stages",
            "there is nothing to export: the model does not change, and projections/ has what "
            "each task trained",
            given="export",
            valid="the stages without export",
        )


def _check_each(run: RunConfig) -> None:
    mode = run.tasks.mode.value
    if run.model.scratch is not None:
        raise ConfigError(
            "model.scratch",
            f"tasks.mode={mode} loads its model several times, and random weights would differ "
            "each time",
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


def _require_stage(run: RunConfig, stage: Stage, why: str) -> None:
    if stage not in run.stages:
        raise ConfigError(
            "stages",
            f"tasks.mode={run.tasks.mode.value} needs `{stage.value}`: {why}",
            given=[s.value for s in run.stages],
            valid=f"add `{stage.value}`",
        )
