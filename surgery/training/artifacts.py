"""What a run took and made, as W&B artifacts: original → plan → export, and score tables.

Every artifact holds a small JSON file that says what it is, so that W&B keeps one version of equal
things: the runs of a sweep share their original. Weights are uploaded only when asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import wandb

from surgery.console import say

# Calibrated tensors larger than this go up only together with the export.
LARGE = 256 * 2**20
_NAME = 120  # characters that W&B allows are a few more


def log_original(run: Any, about: Mapping[str, Any]) -> dict[str, str]:
    """Log the model that everything is made from: an input of the run, without weights.

    W&B takes inputs only while it is online. Offline, it is logged like the others, and what was
    made from it says so in its metadata (`made_from`).

    Returns:
        Its name and digest, for `made_from`.
    """
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(about["name"])).strip("-") or "model"
    artifact = _make_artifact(f"original-{slug[-_NAME + 20 :]}", "model", about, "original.json")
    if run.offline:
        run.log_artifact(artifact)
    else:
        try:
            run.use_artifact(artifact)
        except (wandb.Error, ValueError) as error:
            say(f"  W&B did not take {artifact.name} as an input: {error}")
    return _describe_artifact(artifact)


def log_plan(
    run: Any, about: Mapping[str, Any], files: Sequence[Path], *, upload: bool
) -> dict[str, str]:
    """Log `plan.json`, and its tensors unless too large (`LARGE`) and `upload` is off."""
    small = [file for file in files if upload or file.stat().st_size <= LARGE]
    left = [file.name for file in files if file not in small]
    if left:
        say(f"  W&B: {', '.join(left)} stays here; logger.upload_export=true sends it")
    artifact = _make_artifact(f"plan-{run.id}", "plan", {**about, "left_out": left}, None)
    for file in small:
        artifact.add_file(str(file))
    run.log_artifact(artifact)
    return _describe_artifact(artifact)


def log_export(run: Any, about: Mapping[str, Any], folder: Path, *, upload: bool) -> None:
    """Log the exported model: what it is, and the whole directory where `upload` is set."""
    about = {**about, "uploaded": upload}
    artifact = _make_artifact(f"export-{run.id}", "model", about, "export.json")
    if upload:
        artifact.add_dir(str(folder), policy="immutable")  # no second copy on this disk
    run.log_artifact(artifact)


def log_tables(run: Any, name: str, about: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Log a table of heads as ``NAME-RUN_ID``, which another run can take its heads from."""
    artifact = _make_artifact(f"{name}-{run.id}", "head-scores", about, None)
    for file in files:
        artifact.add_file(str(file))
    run.log_artifact(artifact)


def show_scores(run: Any, table: pa.Table) -> None:
    """Log one score table under ``score_table``, for a panel; nothing if it is too long.

    Args:
        table: with the columns of `ScoreTable.to_arrow`; query heads, or groups without them.
    """
    units = table["unit"].to_pylist()
    table = table.filter(pa.array([unit == units[0] for unit in units]))
    if table.num_rows <= wandb.Table.MAX_ROWS:
        data = [list(row.values()) for row in table.to_pylist()]
        run.log({"score_table": wandb.Table(columns=table.column_names, data=data)})


def show_picture(run: Any, name: str, file: Path, caption: str) -> None:
    run.log({name: wandb.Image(str(file), caption=caption)})


def _make_artifact(
    name: str, kind: str, about: Mapping[str, Any], file: str | None
) -> wandb.Artifact:
    """Make an artifact with `about` as its metadata, and as `file` in it."""
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", name), kind, metadata=dict(about))
    if file is not None:
        with artifact.new_file(file) as opened:
            opened.write(json.dumps(about, indent=1, sort_keys=True) + "\n")
    return artifact


def _describe_artifact(artifact: wandb.Artifact) -> dict[str, str]:
    return {"name": artifact.name, "digest": artifact.digest}
