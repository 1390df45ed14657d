"""Check somebody's batches, and find what their labels are labels of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.config.schema import Task
from surgery.data.collate import Batch
from surgery.errors import ConfigError, get_first_line

NO_LOSS = "output_norm or random, which need no loss"
# What a forward raises for arguments that it lacks, does not know or cannot use.
_FAULTS = (TypeError, ValueError, IndexError, RuntimeError)


def prepare_batches(model: PreTrainedModel, batches: Iterable[Batch]) -> list[Batch]:
    """Check that batches are arguments of forward passes, and add a decoder's inputs.

    These are what the model itself makes of the labels, which its forward is not given here.

    Raises:
        ConfigError: a batch is not a mapping of tensors.
    """
    return [_add_decoder_inputs(model, _check_batch(batch)) for batch in batches]


def _check_batch(batch: Any) -> Batch:
    valid = "a mapping of names to tensors: the arguments of a forward pass, and labels"
    if not isinstance(batch, Mapping) or not batch:
        raise ConfigError(
            "data", "a batch must be a mapping", given=type(batch).__name__, valid=valid
        )
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            given = f"{name}: {type(value).__name__}"
            raise ConfigError("data", "a batch must hold only tensors", given=given, valid=valid)
    return batch


def _add_decoder_inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    has_own = any(name.startswith("decoder_input") for name in batch)
    if not model.config.is_encoder_decoder or has_own or "labels" not in batch or make is None:
        return batch
    return {**batch, "decoder_input_ids": make(labels=batch["labels"])}


def find_task(model: PreTrainedModel, batches: Iterable[Batch]) -> Task:
    """Find how the labels belong to the logits: one class per row, or one label per token.

    A model that generates predicts the next token; others, and decoders whose inputs are shifted,
    predict each label in its own place (`Task.masked_lm`).
    """
    labels = next((batch["labels"] for batch in batches if "labels" in batch), None)
    if labels is not None and labels.ndim < 2:
        return Task.sequence_classification
    shifted = model.can_generate() and not model.config.is_encoder_decoder
    return Task.causal_lm if shifted else Task.masked_lm


def check_labels(batch: Batch, estimator: str, task: Task) -> None:
    """Check that a batch has labels of the kind that `task` needs.

    Raises:
        ConfigError: it has not.
    """
    key = "importance.estimator"
    if "labels" not in batch:
        raise ConfigError(
            key, "needs labels, but the batches have none", given=estimator, valid=NO_LOSS
        )
    labels = batch["labels"]
    given = f"{estimator}, labels of shape {list(labels.shape)} and {labels.dtype}"
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        problem = "needs labels that are classes, not numbers"
        raise ConfigError(key, problem, given=given, valid=f"integers, or {NO_LOSS}")
    per_row = task is Task.sequence_classification
    if per_row and labels.numel() != len(labels):
        problem, wanted = "needs one class for each row", "labels of shape [rows]"
    elif not per_row and labels.ndim != 2:
        problem, wanted = "needs a label for each token", "labels of shape [rows, tokens]"
    else:
        return
    raise ConfigError(key, problem, given=given, valid=f"{wanted}, or {NO_LOSS}")


def run_model(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Run a forward pass over somebody's inputs.

    Raises:
        ConfigError: the model does not take them.
    """
    try:
        return model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        tensors = {k: list(v.shape) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        raise ConfigError(
            "data",
            f"{type(model).__name__} cannot run on this batch: {get_first_line(error)}",
            given=", ".join(f"{name} {shape}" for name, shape in tensors.items()),
            valid="the arguments of its forward",
        ) from error
