"""Several tasks in one run: compare their heads, or make one mask for all of them."""

from __future__ import annotations

from typing import Any

import torch

from surgery.config.schema import TaskMode
from surgery.console import say
from surgery.files import write_json
from surgery.lab.tasks.agreement import find_needed_by_one
from surgery.lab.tasks.declare import NO_MASK
from surgery.lab.tasks.losses import find_harm, measure_task_losses
from surgery.lab.tasks.masks import choose_mask, make_gates
from surgery.lab.tasks.picture import draw_tasks
from surgery.models.sites import find_sites
from surgery.pipeline.files import TASKS, TASKS_PICTURE, name_scores
from surgery.pipeline.scorer import score_tasks
from surgery.pipeline.session import Session


def compare_tasks(session: Session) -> None:
    """Compare scores, masks and losses under every mask of all tasks; the model is unchanged."""
    run, model, data = session.run, session.load_model(), session.prepared.task_data
    sites = find_sites(model).sites
    with torch.random.fork_rng():
        tables = score_tasks(session, model, (), run.importance.estimator, "both")
    operations = session.prepared.operations
    masks = {name: choose_mask(operations, sites, table) for name, table in tables.items()}
    losses = {NO_MASK: measure_task_losses(model, data, run, NO_MASK)}
    for name, mask in masks.items():
        with make_gates(model, sites, mask) as gates:
            losses[name] = measure_task_losses(model, data, run, f"mask for {name}")
            gates.require_calls()
    session.results.tasks |= {
        "losses": losses,
        "masks": {
            name: {str(layer): list(heads) for layer, heads in mask.items()}
            for name, mask in masks.items()
        },
        "only": find_needed_by_one(masks, {site.layer: site.q_heads for site in sites}),
        "limit": run.tasks.hurts,
        "hurts": find_harm(losses, NO_MASK, run.tasks.hurts),
    }


def measure_tasks(session: Session, moment: str) -> None:
    """Measure the held-out loss of each task at this moment of the run."""
    label = moment.replace("_", " ")
    losses = measure_task_losses(
        session.load_model(), session.prepared.task_data, session.run, label
    )
    session.results.tasks.setdefault("losses", {})[moment] = losses


def write_tasks(session: Session) -> None:
    """Write `tasks.json` and `tasks.png` from the results."""
    cfg, results = session.run.tasks, session.results
    head: dict[str, Any] = {"mode": cfg.mode.value, "names": list(cfg.data or {})}
    if cfg.mode is TaskMode.one_mask:
        head |= {"combine": cfg.combine.value, "weights": cfg.weights}
    results.tasks = head | {"losses": {}} | results.tasks
    write_json(session.run_dir / TASKS, results.tasks)
    if results.tasks["losses"]:
        names = {name: name_scores(name) for name in head["names"]}
        tables = {n: results.scores[file] for n, file in names.items() if file in results.scores}
        draw_tasks(results.tasks, tables, session.run_dir / TASKS_PICTURE)
    say(f"  tasks: {TASKS}, {TASKS_PICTURE}")
