"""A small model on disk, a plan for it, and a module that heals it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback

from surgery.config.schema import ModelConfig, Task
from surgery.data.module import TextData
from surgery.models.source import ModelSource
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.training.module import SurgeryModule, parse_section
from surgery.training.trainer import build_trainer
from tests.data.making import documents, text_data, write_texts
from tests.tiny_models import tiny_model

CONF = Path(__file__).parents[2] / "conf"


def options(group: str, name: str, /, **fields: Any) -> dict[str, Any]:
    """`<group>=<name>` with overrides, as plain data; a learning rate where the run picks one."""
    rate = {"lr": 1e-3} if group == "optim" else {}
    merged = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"), rate, fields)
    plain = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_model(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "llama", **fields: Any
) -> Path:
    """4 query and 2 KV heads; a llama with a position range worth rotating over."""
    if name == "llama":
        fields = {"max_position_embeddings": 4096} | fields
    model = tiny_model(name, **fields)
    model.config.dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def operated(
    folder: Path,
    *,
    objective: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    pairs: list[list[str]] | None = None,
    deferred: dict[str, Any] | None = None,
    scorer: Any = None,
    **model: Any,
) -> SurgeryModule:
    """A `SurgeryModule` that makes the model in `folder` multi-query, or what `attention` says."""
    spec = options("model", "embedded", path=str(folder), **model)
    source = ModelSource(parse_section(ModelConfig, spec))
    config = source.load_config()
    declared = {"gqa": {"kv_heads": 1}} if attention is None else attention
    plan = make_plan(source.build_meta_model(config), parse_operations(declared))
    fields = config.to_dict()
    return SurgeryModule(
        model=spec,
        model_config={
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in fields.items()
        },
        plan=plan.to_json(),
        objective=objective or options("objective", "lm"),
        optim=optim or options("optim", "adamw", warmup_steps=2),
        pairs=pairs,
        deferred=deferred,
        scorer=scorer,
    )


def small_data(folder: Path, **fields: Any) -> TextData:
    """Four training batches of two windows."""
    path = write_texts(folder / "train.jsonl", documents(20))
    defaults = {"val_path": write_texts(folder / "held_out.jsonl", documents(30)[20:])}
    return text_data(path, task=Task.causal_lm, **{**defaults, "seq_len": 12, **fields})


class Losses(Callback):
    """The loss of every training batch, exactly; stops the run after `stop` steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.values: list[float] = []
        self.stop = stop

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.values.append(outputs["loss"].item())
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.stop


def fit(
    module: pl.LightningModule,
    data: TextData,
    run_dir: Path,
    *,
    callbacks: list[Callback] | None = None,
    resume: Path | None = None,
    schedule: dict[str, Any] | None = None,
    **overrides: Any,
) -> pl.Trainer:
    """As the pipeline's training stage does it, on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    trainer = build_trainer(
        options("trainer", "default", **(quiet | overrides)),
        run_dir=run_dir,
        callbacks=callbacks or [],
        loggers=[],
        schedule=schedule,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer
