"""Rows to a batch of tensors, with masks and labels that agree."""

from __future__ import annotations

import zlib
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
MASK_ATTEMPTS = 100


def collator(
    tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, task: Task
) -> Callable[[list[dict[str, Any]]], Batch]:
    """What turns a list of rows into a batch for `task`.

    Raises:
        ConfigError: a tokenizer without the mask or pad token that `task` needs, or a share of
            zero to mask.
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
            "masks nothing, so nothing is learnt",
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
        # Short rows may be left without any mask, and a mean over nothing is no number.
        for _ in range(MASK_ATTEMPTS):
            batch = dict(self._mask(rows))
            if (batch["labels"] != IGNORED).any():
                break
        return batch


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
