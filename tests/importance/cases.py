"""Models of several kinds, with a batch of uneven rows each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from surgery import apply_, make_plan
from surgery.config.schema import ObjectiveName, Task
from surgery.data.collate import Batch
from surgery.importance.work import Work
from surgery.operations.prune_heads.operation import PruneHeads
from tests.families import family, masked_lm, randomised, tokens
from tests.tiny_models import FIELDS

CASES = ("llama", "qwen3", "gemma2", "gpt2", "bert", "classes", "t5")


def case(name: str) -> tuple[PreTrainedModel, Batch, Task]:
    """fp64, eval mode; the second of three rows is padded."""
    ids = tokens(3, 10)
    real = torch.ones_like(ids)
    real[1, 6:] = 0
    labels = ids.masked_fill(real == 0, -100)
    batch = {"input_ids": ids, "attention_mask": real, "labels": labels}
    some = labels.masked_fill(torch.arange(10) % 3 > 0, -100)
    if name == "bert":
        return masked_lm("bert"), {**batch, "labels": some}, Task.masked_lm
    if name == "classes":
        config = AutoConfig.for_model("bert", **FIELDS["bert"], num_labels=3)
        model = AutoModelForSequenceClassification.from_config(config)
        classes = torch.tensor([2, 0, 1])
        return _wide(model), {**batch, "labels": classes}, Task.sequence_classification
    if name == "t5":
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **FIELDS["t5"]))
        return _wide(model), {**batch, "decoder_input_ids": ids, "labels": some}, Task.masked_lm
    if name == "gpt2":
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **FIELDS["gpt2"]))
        return _wide(model), batch, Task.causal_lm
    return family(name, num_key_value_heads=4), batch, Task.causal_lm


def work(
    model: PreTrainedModel, sites: Sequence[Any], task: Task, units: Sequence[str], **other: Any
) -> Work:
    fields = {"objective": ObjectiveName.lm, "seed": 0, "memory_rows": 32, **other}
    return Work(model, sites, units, task, **fields)


def pruned(model: PreTrainedModel, heads: dict[int, list[int]]) -> PreTrainedModel:
    """The same model, physically without these heads of each layer."""
    copied = copy.deepcopy(model)
    return apply_(copied, make_plan(copied, [PruneHeads(heads=heads)]), check=False)


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    return randomised(model, 0, torch.float64)
