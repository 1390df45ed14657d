"""Names of the files in a run's directory, but those of plans and summaries; and their drafts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from surgery.files import DRAFT

CONFIG = "config.yaml"

IMPORTANCE = "importance"  # of the run; `importance-TASK` of a task: .json and .parquet
IMPORTANCE_PICTURE = "importance.png"

ANALYSIS = "analysis"
HEADS = "heads"  # .json and .parquet
REDUNDANCY = "redundancy"  # .json and .parquet
GROUPS = "groups.json"
ROLES_PICTURE = "roles.png"
SIMILARITY_PICTURE = "similarity.png"
PROBES_PICTURE = "probes.png"

TASKS = "tasks.json"
TASKS_PICTURE = "tasks.png"
TASK_RUNS = "tasks"  # a run directory per task
PROJECTIONS = "projections"

BEST_WEIGHTS = "best.safetensors"
CHECKPOINTS = "checkpoints"
FINAL_CHECKPOINT = f"{CHECKPOINTS}/final.ckpt"
EXPORT = "export"
EXPORT_DRAFT = f"{EXPORT}{DRAFT}"
EXPORT_OLD = f"{EXPORT}.old{DRAFT}"  # of an earlier run, while the new one takes its place
RECORD = "surgery.json"  # in the export: what was done to the model
CARD = "README.md"  # in the export

WATCHED_HEADS = "heads*.parquet"  # numbered where an earlier run has left one

RESULT_PICTURE = "result.png"
FRONT_PICTURE = "front.png"
REPORT = "report.html"

# Patterns of what an earlier run in the same directory leaves to a new one, which may not write
# all of it.
KEPT = (
    EXPORT,
    CHECKPOINTS,
    BEST_WEIGHTS,
    ANALYSIS,
    f"{IMPORTANCE}*.json",
    IMPORTANCE_PICTURE,
    TASKS,
    TASK_RUNS,
    PROJECTIONS,
    WATCHED_HEADS,
    "metrics.csv",
)


def name_scores(task: str) -> str:
    """Name the score table of a task, without its suffix."""
    return f"{IMPORTANCE}-{task}"


def remove_drafts(run_dir: Path) -> None:
    """Remove what a run that was killed had not finished writing."""
    for path in list(_find_drafts(run_dir)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# A run directory may be somebody's working directory, so only what runs write there counts.
_WRITTEN = (
    CONFIG,
    "plan.*",
    BEST_WEIGHTS,
    "summary.*",
    REPORT,
    RESULT_PICTURE,
    FRONT_PICTURE,
    WATCHED_HEADS,
    f"{IMPORTANCE}*",
    "tasks.*",
    EXPORT,
    f"{EXPORT}.old",
)
_FOLDERS = (CHECKPOINTS, ANALYSIS, PROJECTIONS)


def _find_drafts(run_dir: Path) -> Iterator[Path]:
    for name in (*_WRITTEN, *(f"{folder}/*" for folder in _FOLDERS)):
        yield from run_dir.glob(f"{name}{DRAFT}")
