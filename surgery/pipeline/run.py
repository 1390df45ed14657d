"""Execute a whole run, from a composed config to a directory of results."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from surgery.config.schema import Stage
from surgery.config.validate import check_config
from surgery.console import is_rank_zero
from surgery.files import write_text
from surgery.lab.tasks.declare import EACH, check_tasks
from surgery.pipeline.check import check_run, check_writable
from surgery.pipeline.each_task import prepare_each, run_each
from surgery.pipeline.files import CONFIG
from surgery.pipeline.prepare import prepare
from surgery.pipeline.stages import run_stages


def execute(cfg: DictConfig) -> None:
    """Check everything, then run the stages that were asked for: once, or once per task.

    Raises:
        SurgeryError: something cannot be done; no incomplete file is left.
    """
    start = time.perf_counter()
    run = check_config(cfg)
    run_dir = Path(run.run_dir)
    check_writable(run_dir)
    if set(run.stages) == {Stage.report}:
        from surgery.pipeline.report import report_again  # seconds, for matplotlib and pyarrow

        report_again(run_dir)
        return
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    settings = {str(key): value for key, value in resolved.items()}
    operations = check_run(run)
    tasks = check_tasks(run, operations)
    if tasks and run.tasks.mode in EACH:
        runs = prepare_each(run, run_dir, settings, operations, tasks)
        _write_config(cfg, run_dir)
        run_each(runs, start)
    else:
        session = prepare(run, run_dir, settings, operations, tasks)
        _write_config(cfg, run_dir)
        run_stages(session, start)


def _write_config(cfg: DictConfig, run_dir: Path) -> None:
    if is_rank_zero():
        write_text(run_dir / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
