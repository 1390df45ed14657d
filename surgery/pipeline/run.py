"""A whole run, from a composed config to a directory of results."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from surgery.config.schema import Stage
from surgery.execute.live import apply_
from surgery.measure import measure_model
from surgery.pipeline.export import export
from surgery.pipeline.prepare import prepare
from surgery.pipeline.session import Session
from surgery.pipeline.train import train


def execute(cfg: DictConfig) -> Session:
    """Check everything, then run the stages that were asked for.

    Raises:
        SurgeryError: something cannot be done; nothing half-written is left.
    """
    session = prepare(cfg)
    pl.seed_everything(session.run.seed, verbose=False)
    if session.run.threads:
        torch.set_num_threads(session.run.threads)
    (session.run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    _measure(session, "before")
    if session.has(Stage.operate) and session.plan.changes:
        model = session.loaded()
        with session.stage("operate"):
            apply_(model, session.plan)
        _measure(session, "after_surgery")
    if session.has(Stage.train):
        with session.stage("train"):
            train(session)
        _measure(session, "after_training")
    if session.has(Stage.export):
        with session.stage("export"):
            export(session)
    return session


def _measure(session: Session, moment: str) -> None:
    if not session.has(Stage.measure):
        return
    model = session.loaded()
    assert session.data is not None
    label = moment.replace("_", " ")
    with session.stage(f"measure {label}"):
        session.measurements[moment] = measure_model(
            model, session.data, session.run.measure, session.run.model.task, label=label
        )
