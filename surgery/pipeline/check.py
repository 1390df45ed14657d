"""Checks of a run, mostly before its model is planned on."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.config.schema import (
    Layout,
    ObjectiveName,
    OptimizerName,
    RunConfig,
    Stage,
    Task,
)
from surgery.errors import ConfigError, get_first_line
from surgery.importance.work import check_estimator
from surgery.models.length import LENGTH, read_length
from surgery.plan.make import check_order
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations


def check_run(run: RunConfig) -> list[Operation]:
    """Check a run by its config alone, and return its operations.

    Raises:
        ConfigError: a stage without another that it needs, an invalid operation, or a device that
            does not exist.
    """
    _check_stages(run)
    _check_healing_stage(run)
    operations = parse_operations(run.attention)
    check_order(operations)
    for operation in operations:
        operation.check_run(run)
    _check_device(run.model.device)
    _check_estimators(run, operations)
    return operations


def check_writable(run_dir: Path) -> None:
    """Check that the run directory, which Hydra has made, can be written to.

    Raises:
        ConfigError: it cannot.
    """
    if not os.access(run_dir, os.W_OK):
        raise ConfigError("hydra.run.dir", "cannot be written to", given=str(run_dir))


def check_calibrated(run: RunConfig, plan: Plan) -> None:
    """Check that a plan with open decisions is calibrated before it is performed.

    Raises:
        ConfigError: the stage `calibrate` is missing.
    """
    performed = Stage.operate in run.stages and Stage.calibrate not in run.stages
    if plan.open_decisions and performed:
        raise ConfigError(
            "stages",
            f"`operate` needs `calibrate` before it: {plan.open_decisions[0]}",
            given=[stage.value for stage in run.stages],
            valid="add `calibrate`",
        )


def check_fit(run: RunConfig, config: Any, plan: Plan) -> None:
    """Check that the model can read the data.

    Args:
        config: the original's.

    Raises:
        ConfigError: the windows are too long for the model, or the batches are of the wrong kind.
    """
    text = copy.deepcopy(config.get_text_config())
    for key, value in plan.config_patch.items():
        name = key.rpartition(".")[2]
        if name in (LENGTH, "rope_parameters"):
            setattr(text, name, value)
    limit = read_length(text)
    if limit is not None and run.data.seq_len > limit:
        raise ConfigError(
            "data.seq_len",
            "is more than the model has positions",
            given=run.data.seq_len,
            valid=f"2 to {limit}",
        )
    data = run.data
    implementation = plan.implementation or run.model.attn_implementation
    flash = "flash" in str(implementation)
    if flash and data.isolate_documents and data.layout is Layout.packed and data.batch_size > 1:
        raise ConfigError(
            "data.isolate_documents",
            "under flash, transformers isolates packed documents only in batches of one",
            given=f"data.batch_size={data.batch_size}, {implementation}",
            valid="data.batch_size=1, isolate_documents=false, or model.attn_implementation=sdpa",
        )
    if run.model.task is Task.sequence_classification and config.pad_token_id is None:
        raise ConfigError(
            "model.task",
            "sequence_classification pads its batches, and this model has no pad token",
            given=run.model.path,
            valid="a model whose config.json has a pad_token_id",
        )


def check_tokenizer(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Check that the model embeds every token of a tokenizer that is not its own.

    Raises:
        ConfigError: it does not.
    """
    if run.model.tokenizer is None:
        return
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokens > rows:
        raise ConfigError(
            "model.tokenizer",
            f"has {tokens} tokens, but the model embeds {rows}",
            given=run.model.tokenizer,
            valid="null: the model's own, or one of as many tokens",
        )


def _check_stages(run: RunConfig) -> None:
    changing = {Stage.train, Stage.export} & set(run.stages)
    if run.attention and changing and Stage.operate not in run.stages:
        raise ConfigError(
            "stages",
            f"attention.{next(iter(run.attention))} is declared, but never performed",
            given=[stage.value for stage in run.stages],
            valid="add `operate`, or attention=[]",
        )
    if run.resume is None:
        return
    if Stage.train not in run.stages:
        raise ConfigError(
            "resume", "there is nothing to resume without the stage `train`", given=run.resume
        )
    if not Path(run.resume).is_file():
        raise ConfigError("resume", "there is no such checkpoint", given=run.resume)


def _check_healing_stage(run: RunConfig) -> None:
    if Stage.train not in run.stages:
        return
    distilled = run.objective.name is ObjectiveName.distill
    if distilled and run.model.scratch is not None and run.objective.teacher is None:
        raise ConfigError(
            "objective",
            "a teacher with random weights teaches nothing",
            given="distill",
            valid="objective=lm, a model.path, or an objective.teacher",
        )
    if distilled and run.model.num_labels == 1:
        raise ConfigError(
            "objective",
            "with one label the task is a regression, which has no distribution to learn from",
            given="distill",
            valid="objective=lm",
        )
    sharded = str(run.trainer.get("strategy")).startswith(("fsdp", "deepspeed"))
    if sharded and run.optim.name is OptimizerName.muon:
        raise ConfigError(
            "optim",
            "Muon needs whole matrices, and this strategy shards them",
            given="muon",
            valid="optim=adamw",
        )


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "model.device", get_first_line(error), given=device, valid="auto, cpu, cuda, …"
        ) from None


def _check_estimators(run: RunConfig, operations: Sequence[Operation]) -> None:
    """Check the estimators of the stage `score` and of every operation that needs scores."""
    estimators = {
        operation.get_key("estimator"): operation.scored_by
        for operation in operations
        if operation.scored_by is not None
    }
    if Stage.score in run.stages:
        estimators["importance.estimator"] = run.importance.estimator
    for key, estimator in estimators.items():
        check_estimator(key, estimator, run.importance.objective)
