"""Several tasks in one run: their heads compared, or one mask made for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.config.schema import DataConfig, TaskMode
from surgery.console import say
from surgery.files import write_json
from surgery.importance.estimate import Scorer
from surgery.importance.table import ScoreTable
from surgery.lab.tasks import combined
from surgery.lab.tasks.agreement import correlations, needed_by_one
from surgery.lab.tasks.declare import NO_MASK, of_task
from surgery.lab.tasks.losses import harm, task_losses
from surgery.lab.tasks.masks import choose_mask, gates_of
from surgery.lab.tasks.picture import draw_tasks
from surgery.models.sites import Site, find_sites
from surgery.pipeline.importance import importance_batches, score_on
from surgery.pipeline.session import Session
from surgery.plan.registry import parse_operations

FILE = "tasks.json"
PICTURE = "tasks.png"


def prepare_tasks(session: Session, tasks: Mapping[str, DataConfig]) -> None:
    """Read the data of each task.

    Raises:
        ConfigError: with keys of `tasks.data.NAME`.
    """
    from surgery.data.module import TextData
    from surgery.pipeline.prepare import check_fit

    run = session.run
    session.tokenizer = session.tokenizer or session.source.load_tokenizer()
    for name, cfg in tasks.items():
        with of_task(name):
            check_fit(replace(run, data=cfg), session.source.load_config(), session.plan)
            data = TextData(cfg, session.tokenizer, run.model.task, run.seed)
            data.setup()
        session.task_data[name] = data


def compare_tasks(session: Session) -> None:
    """Scores, masks and losses of every task under every mask; the model is left as it is."""
    run, model = session.run, session.loaded()
    sites = find_sites(model).sites
    with torch.random.fork_rng():
        tables = task_tables(session, model, (), run.importance.estimator, "both")
    operations = parse_operations(run.attention)
    masks = {name: choose_mask(operations, sites, table) for name, table in tables.items()}
    losses = {NO_MASK: task_losses(model, session.task_data, run, NO_MASK)}
    for name, mask in masks.items():
        with gates_of(model, sites, mask) as gates:
            losses[name] = task_losses(model, session.task_data, run, f"mask for {name}")
            gates.require_calls()
    session.tasks |= {
        "losses": losses,
        "masks": {
            name: {str(layer): list(heads) for layer, heads in mask.items()}
            for name, mask in masks.items()
        },
        "only": needed_by_one(masks, {site.layer: site.q_heads for site in sites}),
        "limit": run.tasks.hurts,
        "hurts": harm(losses, NO_MASK, run.tasks.hurts),
    }


def combined_scorer(session: Session) -> Scorer:
    """Scores heads on the data of every task, and makes one table of theirs."""

    def scored(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        tables = task_tables(session, model, sites, estimator, unit)
        cfg = session.run.tasks
        return combined(tables, cfg.combine, cfg.weights)

    return scored


def task_tables(
    session: Session, model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
) -> dict[str, ScoreTable]:
    """The scores of each task, written down as ``importance-<task>.json`` and `.parquet`."""
    tables = {}
    for name, data in session.task_data.items():
        say(f"  scores for {name}")
        batches = importance_batches(session, data)
        tables[name] = score_on(session, batches, model, sites, estimator, unit, data_name=name)
        tables[name].save(session.run_dir / f"importance-{name}.json")
    session.tasks |= {"estimator": estimator, "spearman": correlations(tables)}
    session.task_tables = tables
    return tables


def measure_tasks(session: Session, moment: str) -> None:
    """The held-out loss of each task at this moment of the run."""
    label = moment.replace("_", " ")
    found = task_losses(session.loaded(), session.task_data, session.run, label)
    session.tasks.setdefault("losses", {})[moment] = found


def keep_tasks(session: Session) -> None:
    """`tasks.json` and `tasks.png`, from what was found."""
    cfg = session.run.tasks
    head: dict[str, Any] = {"mode": cfg.mode.value, "names": list(cfg.data or {})}
    if cfg.mode is TaskMode.one_mask:
        head |= {"combine": cfg.combine.value, "weights": cfg.weights}
    session.tasks = head | {"losses": {}} | session.tasks
    write_json(session.run_dir / FILE, session.tasks)
    if session.tasks["losses"]:
        draw_tasks(session.tasks, session.task_tables, session.run_dir / PICTURE)
    say(f"  tasks: {FILE}, {PICTURE}")
