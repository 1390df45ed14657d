"""A run of two processes: DDP on gloo; Lightning starts the second one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_they_calibrate_and_train_one_model(process: Callable[..., Any], tmp_path: Path) -> None:
    """The first one speaks and writes."""
    outcome = process(
        "+recipe=gqa_optimal",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "data.seq_len=64",
        "data.batch_size=2",
        "trainer.max_steps=4",
        "measure.windows=8",
        "measure.prefill_tokens=32",
        "measure.decode_tokens=2",
        "measure.repeats=1",
        "report.prompts=[]",
        "calibration.windows=8",
        "calibration.batch_size=4",
        "calibration.refine_steps=4",
        "calibration.joint_steps=2",
        "calibration.rows=16",
        "logger=csv",
        "threads=1",
        f"hydra.run.dir={tmp_path}",
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["training"]["steps"] == 4
    assert summary["training"]["tokens"] == 4 * 2 * 2 * 64
    assert outcome.out.count("calibration: done") == 1
    assert outcome.out.count("Result for embedded") == 1
    assert (tmp_path / "export/model.safetensors").exists()
    assert (tmp_path / "heads.parquet").exists()
