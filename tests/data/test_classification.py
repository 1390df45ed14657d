"""Sequence classification: text and label columns to padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from surgery.config.schema import Task
from surgery.data.module import TextData
from surgery.errors import ConfigError
from tests.data.making import (
    PAD,
    data_config,
    documents,
    ids_of,
    text_data,
    word_tokenizer,
    write_rows,
)
from tests.tiny_models import FIELDS

TEXTS = [f"w{index} {text}" for index, text in enumerate(documents(30))]
ROWS = [{"body": text, "topic": index % 3} for index, text in enumerate(TEXTS)]
COLUMNS = {"text_column": "body", "label_column": "topic", "layout": "padded", "seq_len": 6}


def _data(tmp_path: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> TextData:
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    tokenizer = word_tokenizer(pad_token="<pad>")
    return text_data(
        path, tokenizer, task=Task.sequence_classification, val_path=path, batch_size=4, **COLUMNS
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_keep_their_labels(tmp_path: Path, suffix: str) -> None:
    data = _data(tmp_path, ROWS, suffix)
    labels = {tuple(ids_of(row["body"])[:6]): row["topic"] for row in ROWS}
    names = ("input_ids", "attention_mask", "labels")
    seen = 0
    for batch in data.train_dataloader():
        assert set(batch) == set(names)
        for ids, mask, label in zip(*(batch[name].tolist() for name in names), strict=True):
            words = tuple(token for token in ids if token != PAD)
            assert mask == [int(token != PAD) for token in ids]
            assert labels[words] == label
            seen += 1
    assert seen == 28  # whole batches of four


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_takes_a_step(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **FIELDS[name], num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = next(iter(_data(tmp_path, ROWS).train_dataloader()))
    output = model(**batch)
    with torch.no_grad():
        for index in range(4):
            alone = batch["input_ids"][index][batch["attention_mask"][index].bool()]
            torch.testing.assert_close(
                output.logits[index], model(input_ids=alone[None]).logits[0], atol=1e-5, rtol=0
            )
    by_hand = -output.logits.log_softmax(-1)[torch.arange(4), batch["labels"]].mean()
    torch.testing.assert_close(output.loss, by_hand)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert model(**batch).loss < output.loss


@pytest.mark.parametrize("label", ["sport", 1.0, None, -1, True])
@pytest.mark.parametrize("streaming", ["never", "always"])
def test_labels_that_are_no_class_numbers_are_refused(
    tmp_path: Path, label: Any, streaming: str
) -> None:
    data = _data(tmp_path, [{"body": row["body"], "topic": label} for row in ROWS])
    data.cfg.streaming = type(data.cfg.streaming)(streaming)
    with pytest.raises(ConfigError, match="whole numbers from 0") as caught:
        data.setup()
    assert caught.value.key == "data.label_column"


def test_the_standard_library_has_no_labels() -> None:
    cfg = data_config("stdlib", layout="padded")
    data = TextData(cfg, word_tokenizer(pad_token="<pad>"), Task.sequence_classification, 0)
    with pytest.raises(ConfigError, match="no labels"):
        data.setup()


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        text_data("x.jsonl", word_tokenizer(), task=Task.sequence_classification)
    assert caught.value.key == "model.tokenizer"
