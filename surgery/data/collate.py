"""Rows to a batch of tensors, with masks and labels that agree."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from surgery.config.schema import DataConfig, Task
from surgery.errors import ConfigError

# Inputs of a model by name, and `labels` where there are some.
Batch = Mapping[str, torch.Tensor]
IGNORED = -100
# Of a row: per token, whether it is to be learnt.
LEARNT = "learnt"
MASK_ATTEMPTS = 100


def make_collator(
    tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, task: Task
) -> Callable[[list[dict[str, Any]]], Batch]:
    """Make the function that turns a list of rows into a batch for `task`.

    Raises:
        ConfigError: the tokenizer lacks the mask or pad token that `task` needs, or
            `data.mlm_probability` is zero.
    """
    if task is Task.causal_lm:
        pad = tokenizer.pad_token_id
        return CausalCollator(tokenizer.eos_token_id or 0 if pad is None else pad)
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "model.tokenizer",
            f"has no pad token, and {task.value} pads its rows",
            valid="a tokenizer with a pad token",
        )
    if task is Task.sequence_classification:
        return DataCollatorWithPadding(tokenizer)
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "model.task", "masked_lm needs a tokenizer with a mask token", given="masked_lm"
        )
    if cfg.mlm_probability == 0:
        raise ConfigError(
            "data.mlm_probability",
            "must be above 0: without masked tokens nothing is learnt",
            given=cfg.mlm_probability,
            valid="above 0, up to 1",
        )
    return MaskedCollator(tokenizer, cfg.mlm_probability)


class MaskedCollator:
    """transformers' masking, drawn from the rows themselves.

    The same rows always get the same masks: in another process, after a resume, at every
    validation. Rows meet in other batches every epoch, so epochs still differ.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        ids = [torch.as_tensor(row["input_ids"]).tolist() for row in rows]
        self._mask.generator = torch.Generator().manual_seed(zlib.crc32(repr(ids).encode()))
        # Short rows may get no mask at all, and the mean loss over no token is NaN.
        for _ in range(MASK_ATTEMPTS):
            batch = dict(self._mask(rows))
            if (batch["labels"] != IGNORED).any():
                break
        return batch


class CausalCollator:
    """Right-pads rows of `input_ids`; labels follow the mask, not the value of the pad token.

    Rows may say which tokens are `learnt`; the others get no label.

    transformers' own collator ignores every label that equals the pad token: a model that pads
    with its end token would never learn to end a text. Batches without padding have no
    `attention_mask`, so that attention takes its fast causal path.
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
            # The first token of a document must not be predicted from the document before it.
            batch["labels"][positions == 0] = IGNORED
        if LEARNT in rows[0]:
            for index, row in enumerate(rows):
                learnt = torch.as_tensor(row[LEARNT]).bool()
                batch["labels"][index, : lengths[index]][~learnt] = IGNORED
        return batch
