"""A score table in Weights & Biases: an artifact that another run can take its heads from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import Logger, WandbLogger

TYPE = "head-scores"


def log_scores(
    loggers: Sequence[Logger], files: Sequence[Path], picture: Path, about: dict[str, Any]
) -> None:
    """Log `files` as the artifact ``importance-RUN_ID``, and the picture beside it.

    Args:
        about: the artifact's metadata: estimator, objective, data, …
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        run = logger.experiment
        artifact = wandb.Artifact(f"importance-{run.id}", type=TYPE, metadata=about)
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        logger.log_image("head_scores", [str(picture)], caption=[str(about["estimator"])])
