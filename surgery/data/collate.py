"""Rows to a batch of tensors, with masks and labels that agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from surgery.config.schema import DataConfig, Task
from surgery.errors import ConfigError

Batch = dict[str, torch.Tensor]
IGNORED = -100


def collator(
    tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, task: Task
) -> Callable[[list[dict[str, Any]]], Batch]:
    """What turns a list of rows into a batch for `task`.

    Raises:
        ConfigError: masked language modelling with a tokenizer that has no mask token.
    """
    if task is Task.masked_lm:
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "model.task", "masked_lm needs a tokenizer with a mask token", given="masked_lm"
            )
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=cfg.mlm_probability)
    if task is Task.sequence_classification:
        return DataCollatorWithPadding(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return CausalCollator(0 if pad is None else pad)


class CausalCollator:
    """Right-pads rows of `input_ids`; labels follow the mask, not the value of the pad token.

    (transformers' own collator ignores every label that equals the pad token, so where a model
    pads with its end token it never learns to end.)
    Unpadded batches carry no `attention_mask`: attention then takes its fast causal path.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        input_ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : lengths[index]] = torch.as_tensor(row["input_ids"])
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        if min(lengths) < longest:
            mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = mask.long()
            batch["labels"][~mask] = IGNORED
        if "position_ids" in rows[0]:
            positions = torch.stack([torch.as_tensor(row["position_ids"]) for row in rows]).long()
            batch["position_ids"] = positions
            # A document's first token would be predicted from another document.
            batch["labels"][positions == 0] = IGNORED
        return batch
