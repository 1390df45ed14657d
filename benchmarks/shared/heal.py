"""Healing: the project's own module and trainer around a model that is changed already."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
from transformers import PreTrainedModel

from benchmarks.shared.schedule import DivergedError
from surgery.config.schema import ObjectiveName, RunConfig
from surgery.data.module import TextData
from surgery.errors import SurgeryError
from surgery.models.source import ModelSource
from surgery.pipeline.train import build_module
from surgery.plan.make import make_plan
from surgery.training.trainer import build_trainer


def heal(
    model: PreTrainedModel, original: PreTrainedModel, run: RunConfig, data: TextData
) -> PreTrainedModel:
    """Train `model` in place for the whole of `run`; `original` is the teacher, left as it is.

    Raises:
        DivergedError: the loss is no number any more.
    """
    source = ModelSource(run.model)
    module = build_module(run, source, make_plan(source.build_meta_model(), []))
    distilled = run.objective.name is ObjectiveName.distill
    module.adopt(model, original if distilled else None)
    pl.seed_everything(run.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build_trainer(dict(run.trainer), run_dir=Path(folder), callbacks=[], loggers=[])
        try:
            trainer.fit(module, datamodule=data)
        except SurgeryError as error:
            raise DivergedError(str(error)) from None
        finally:
            data.trainer = None  # or its loaders would go on where this run ended
    if trainer.global_step != run.trainer["max_steps"]:
        raise RuntimeError(f"{trainer.global_step} steps in place of {run.trainer['max_steps']}")
    assert module.model is not None
    return module.model
