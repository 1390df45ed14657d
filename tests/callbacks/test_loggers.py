"""One real run with every logger: what a dashboard gets, and what it is spared."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from surgery.callbacks import AttentionEntropy, HeadImportance, HeadTable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens

METRICS = ("head_importance", "attention_entropy")
STEPS = {"head_importance": [0, 1, 2, 3, 4], "attention_entropy": [0, 2, 4]}
PICTURES = {"head_importance": [0, 2, 4], "attention_entropy": [0, 4]}
SCALARS = {
    f"{metric}/{rest}"
    for metric in METRICS
    for rest in ("mean", *(f"layer_0{i}/{what}" for i in (0, 1) for what in ("mean", "min")))
}


@dataclass(frozen=True)
class Run:
    root: Path
    monitors: dict[str, HeadImportance | AttentionEntropy]

    def expected(self, key: str) -> dict[int, float]:
        """step → value of a scalar, from what the monitor observed."""
        metric, *rest = key.split("/")
        values = {}
        for seen in self.monitors[metric].observations:
            figures = seen["metrics"][metric]
            if len(rest) == 2:
                figures = figures.split(seen["heads"])[int(rest[0].removeprefix("layer_"))]
            values[seen["step"]] = (figures.min() if rest[-1] == "min" else figures.mean()).item()
        return values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    importance, entropy = HeadImportance(1, 2), AttentionEntropy(2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(root / "staging"))
        wandb_logger = WandbLogger(save_dir=root, project="tests", offline=True)
        fit(
            OwnModule(tiny_model("llama"), lr=0.1),
            [unpadded(tokens(2, 6, seed=i)) for i in range(5)],
            [importance, entropy, HeadTable()],
            root,
            logger=[
                CSVLogger(root, name="", version=""),
                TensorBoardLogger(root, name="tensorboard", version=""),
                wandb_logger,
            ],
        )
        wandb_logger.experiment.finish()
    return Run(root, {"head_importance": importance, "attention_entropy": entropy})


@pytest.fixture(scope="module")
def records(run: Run) -> list[dict[str, Any]]:
    """The offline W&B run, as W&B itself reads it."""
    (file,) = run.root.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_csv(run: Run) -> None:
    got: dict[str, dict[int, float]] = defaultdict(dict)
    with (run.root / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key != "step":
                    got[key][int(row["step"])] = float(value)
    assert set(got) == SCALARS
    for key, values in got.items():
        assert values == pytest.approx(run.expected(key))
        assert list(values) == STEPS[key.split("/")[0]]


def test_tensorboard(run: Run) -> None:
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS
    for key in SCALARS:
        got = {event.step: event.value for event in events.Scalars(key)}
        assert got == pytest.approx(run.expected(key))
    assert set(events.Tags()["images"]) == {f"{metric}/heads" for metric in METRICS}
    for metric in METRICS:
        images = events.Images(f"{metric}/heads")
        assert [image.step for image in images] == PICTURES[metric]
        assert all(image.width > 100 and image.height > 100 for image in images)


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
    assert charts == SCALARS
    assert len(charts) == len(METRICS) * (1 + 2 * 2)


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
