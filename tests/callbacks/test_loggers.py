"""One real run with every logger: what a dashboard gets, and what it is spared."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from surgery.callbacks import AttentionStatistics, HeadAlarms, HeadImportance, HeadTable
from surgery.callbacks.head_monitor import Observation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from surgery.observe.statistics import STATISTICS
from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens
from tests.wandb_records import read_records

METRICS = ("head_importance", *STATISTICS)
STEPS = {metric: [0, 2, 4] for metric in METRICS} | {"head_importance": [0, 1, 2, 3, 4]}
PICTURES = {metric: [0, 4] for metric in METRICS} | {"head_importance": [0, 2, 4]}
# What there is of a metric beside the mean of all heads.
OTHERS = {
    "head_importance": ("mean", "layer/mean", "layer/min"),
    "attention_entropy": ("mean", "layer/mean", "layer/min"),
    "max_logit": ("max", "layer/max"),
}
SCALARS = {
    f"{metric}/{name.replace('layer', f'layer_{layer:02d}')}"
    for metric in METRICS
    for name in OTHERS.get(metric, ("mean",))
    for layer in (0, 1)
}
ALARMS = {f"alarms/{kind}" for kind in ("collapse", "uniform", "logits", "dead")}


@dataclass(frozen=True)
class Run:
    root: Path
    importance: HeadImportance
    statistics: AttentionStatistics

    def expected(self, key: str) -> dict[int, float]:
        """step → value of a scalar, from what the monitor observed."""
        metric, *rest = key.split("/")
        values = {}
        monitor = self.importance if metric == "head_importance" else self.statistics
        for seen in monitor.observations:
            figures = seen["metrics"][metric]
            if len(rest) == 2:
                figures = figures.split(seen["heads"])[int(rest[0].removeprefix("layer_"))]
            figures = figures[~figures.isnan()]
            of = {"min": torch.amin, "max": torch.amax, "mean": torch.mean}[rest[-1]]
            values[seen["step"]] = of(figures).item()
        return values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    importance, statistics = HeadImportance(1, 2), AttentionStatistics(2, 4)
    alarms = HeadAlarms(uniform=0.1, patience=1, action="alert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(root / "staging"))
        wandb_logger = WandbLogger(save_dir=root, project="tests", mode="offline")
        fit(
            OwnModule(tiny_model("llama"), lr=0.1),
            [unpadded(tokens(2, 6, seed=i) % 5 + 3) for i in range(5)],  # tokens that come again
            [importance, statistics, alarms, HeadTable()],
            root,
            logger=[
                CSVLogger(root, name="", version=""),
                TensorBoardLogger(root, name="tensorboard", version=""),
                wandb_logger,
            ],
        )
        wandb_logger.experiment.finish()
    return Run(root, importance, statistics)


@pytest.fixture(scope="module")
def records(run: Run) -> list[dict[str, Any]]:
    """The offline W&B run."""
    return read_records(run.root)


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_csv(run: Run) -> None:
    got: dict[str, dict[int, float]] = defaultdict(dict)
    with (run.root / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("step", *ALARMS):
                    got[key][int(row["step"])] = float(value)
    assert set(got) == SCALARS
    for key, values in got.items():
        assert values == pytest.approx(run.expected(key))
        assert list(values) == STEPS[key.split("/")[0]]


def test_tensorboard(run: Run) -> None:
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS | ALARMS
    for key in SCALARS:
        got = {event.step: event.value for event in events.Scalars(key)}
        assert got == pytest.approx(run.expected(key))
    assert set(events.Tags()["images"]) == {f"{metric}/heads" for metric in METRICS}
    for metric in METRICS:
        images = events.Images(f"{metric}/heads")
        assert [image.step for image in images] == PICTURES[metric]
        assert all(image.width > 100 and image.height > 80 for image in images)


def test_wandb_scalars(run: Run, records: list[dict[str, Any]]) -> None:
    got: dict[str, dict[int, float]] = defaultdict(dict)
    for item in history(records):
        for key, value in item.items():
            if key in SCALARS:
                got[key][item["trainer/global_step"]] = value
    assert set(got) == SCALARS
    for key, values in got.items():
        assert values == pytest.approx(run.expected(key))


def test_wandb_has_no_chart_per_head(records: list[dict[str, Any]]) -> None:
    """Two layers of four heads: the number of charts goes with the layers."""
    keys = {key for item in history(records) for key in item if not key.startswith("_")}
    charts = {key for key in keys if "/heads." not in key} - {"trainer/global_step"}
    assert charts == SCALARS | ALARMS
    assert len(charts) == 13 + 2 * (2 + 2 + 1) + 4


def test_32_layers_of_32_heads_make_few_charts(tmp_path: Path) -> None:
    """1,024 heads times 13 metrics: 13,312 figures at every observed step."""
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    heads, charts = [32] * 32, set()
    for monitor in (HeadImportance(), AttentionStatistics()):
        figures = {name: torch.rand(sum(heads)) for name in monitor.metrics}
        monitor._log(trainer, Observation(step=0, heads=heads, metrics=figures))
        charts |= {key for row in logger.experiment.metrics for key in row} - {"step"}
    assert len(charts) == 13 + 32 * (2 + 2 + 1) == 173


def test_wandb_alert(records: list[dict[str, Any]]) -> None:
    (alert,) = [record["alert"] for record in records if record["type"] == "alert"]
    assert alert["title"] == "uniform at step 0"
    assert alert["text"].startswith("uniform: normalized_entropy past 0.1 in 8 heads (layer.head)")


def test_wandb_heatmaps(run: Run, records: list[dict[str, Any]]) -> None:
    (files,) = run.root.glob("wandb/offline-run-*/files")
    for metric in METRICS:
        key = f"{metric}/heads"
        shown = [item for item in history(records) if f"{key}.filenames" in item]
        assert [item["trainer/global_step"] for item in shown] == PICTURES[metric]
        for item in shown:
            assert item[f"{key}.captions"] == [f"step {item['trainer/global_step']}"]
            (name,) = item[f"{key}.filenames"]
            with Image.open(files / name) as picture:
                assert picture.size == (item[f"{key}.width"], item[f"{key}.height"])
                assert len(set(picture.convert("RGB").getdata())) > 20  # something is drawn


def test_wandb_table_artifact(run: Run, records: list[dict[str, Any]]) -> None:
    (artifact,) = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert artifact["type"] == "head-metrics"
    contents = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    assert set(contents) == {"heads.parquet", "heads.table.json"}
    written = pq.read_table(run.root / "heads.parquet")
    assert pq.read_table(contents["heads.parquet"]).equals(written)
    table = json.loads(Path(contents["heads.table.json"]).read_text())
    assert table["columns"] == written.column_names
    rows = [list(row.values()) for row in written.to_pylist()]
    assert len(rows) == 5 * 2 * 4
    assert table["data"] == rows
