"""Small runs of the pipeline, and what their offline W&B files hold, as W&B itself reads them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from pytorch_lightning.callbacks import Callback

import surgery.hydra  # noqa: F401  (Hydra finds the groups)
from surgery.models.source import make_byte_tokenizer
from surgery.pipeline.run import execute
from tests.tiny_models import tiny_model

LAYERS = 2
QUICK = (
    "data=text",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.val_fraction=0.2",
    "trainer.accelerator=cpu",
    "trainer.max_steps=5",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "optim.warmup_steps=1",
    "callbacks.checkpoint=null",
    "measure.windows=2",
    "measure.batch_size=2",
    "measure.prefill_tokens=8",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "importance.windows=4",
    "importance.batch_size=2",
    "calibration.windows=4",
    "calibration.batch_size=2",
)


def model_and_text(folder: Path) -> tuple[str, ...]:
    """A saved model of 2 layers of 4 heads, and a text; the overrides that name them."""
    # An architecture whose config can say any number of heads.
    model = tiny_model(
        "mistral", vocab_size=len(make_byte_tokenizer()), num_key_value_heads=4, sliding_window=None
    )
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8") * 3)
    where = folder / "model"
    return f"model.path={where}", "model.tokenizer=bytes", f"data.path={folder / 'text.txt'}"


def go(run_dir: Path, *overrides: str) -> None:
    """The run that `python train.py *overrides` is, in this process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"run_dir={run_dir}", *QUICK, *overrides])
    execute(cfg)


def history(found: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Name → the steps at which it was logged. What belongs to one picture or table is one name."""
    steps: dict[str, list[int]] = defaultdict(list)
    for record in found:
        if record["type"] != "history":
            continue
        item = record["history"]["item"]
        for key in {key.split(".")[0] for key in item if not key.startswith("_")}:
            if key not in ("trainer/global_step", "epoch"):
                steps[key].append(item["trainer/global_step"])
    return dict(steps)


def artifacts(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name without the run's id → record, its metadata read and its files by name."""
    named = {}
    for record in found:
        if record["type"] == "artifact":
            artifact = dict(record["artifact"])
            artifact["metadata"] = json.loads(artifact.get("metadata", "{}"))
            contents = artifact["manifest"].get("contents", [])
            artifact["files"] = {entry["path"]: entry.get("local_path") for entry in contents}
            name = artifact["name"].removesuffix(f"-{artifact['run_id']}")
            named[name.removeprefix(f"run-{artifact['run_id']}-")] = artifact
    return named


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's last word."""
    whole: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            whole |= record["summary"]["update"]
    return whole


class Fails(Callback):
    """Ends a run in the middle of its training."""

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("the second step")
