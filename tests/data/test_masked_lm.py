"""Masked language modelling: framed rows, masks where they may be, the same at every call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from surgery.config.schema import Task
from surgery.data.collate import IGNORED, MaskedCollator, make_collator
from surgery.errors import ConfigError
from tests.data.making import (
    BOS,
    EOS,
    MASK,
    PAD,
    all_rows,
    data_config,
    documents,
    ids_of,
    text_data,
    word_tokenizer,
    write_texts,
)
from tests.tiny_models import tiny_model

TEXTS = documents(40)


def _tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer(
        begins=True,
        ends=True,
        pad_token="<pad>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_texts(tmp_path / "texts.jsonl", TEXTS)


def test_rows_are_framed_pieces(path: str) -> None:
    data = text_data(
        path, _tokenizer(), task=Task.masked_lm, layout="padded", seq_len=6, val_path=path
    )
    expected = []
    for text in TEXTS:
        ids = ids_of(text)
        expected += [[BOS, *ids[at : at + 4], EOS] for at in range(0, len(ids), 4)]
    assert [row["input_ids"] for row in all_rows(data)] == expected


def test_masks_fall_on_words_only_and_labels_tell_them() -> None:
    rows = [{"input_ids": [BOS, *ids_of(text), EOS]} for text in TEXTS]
    batch = MaskedCollator(_tokenizer(), 0.5)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    original = torch.tensor(
        [row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows]
    )
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert not chosen[original < 5].any()  # neither frame nor padding
    assert torch.equal(batch["attention_mask"], (original != PAD).long())
    words = int((original >= 5).sum())
    # BERT's recipe: of the chosen half, 80 % masked; bounds at four standard deviations.
    assert abs(int(chosen.sum()) / words - 0.5) < 4 * (0.25 / words) ** 0.5
    masked = int((batch["input_ids"] == MASK).sum()) / int(chosen.sum())
    assert abs(masked - 0.8) < 4 * (0.16 / int(chosen.sum())) ** 0.5


def test_masks_are_a_function_of_the_rows() -> None:
    rows = [{"input_ids": [BOS, *ids_of(text), EOS]} for text in TEXTS]
    collate = MaskedCollator(_tokenizer(), 0.3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = collate(rows[:8])
    assert torch.equal(torch.random.get_rng_state(), before)
    collate(rows[8:])
    again = MaskedCollator(_tokenizer(), 0.3)(rows[:8])
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = collate(rows[7::-1])
    assert not torch.equal(other["labels"].flip(0), first["labels"])


def test_even_one_word_is_masked() -> None:
    collate = MaskedCollator(_tokenizer(), 0.05)
    for word in range(30):
        batch = collate([{"input_ids": [BOS, 5 + word, EOS]}])
        assert batch["labels"].tolist() == [[IGNORED, 5 + word, IGNORED]]


def test_held_out_batches_are_the_same_at_every_call(path: str) -> None:
    data = text_data(path, _tokenizer(), task=Task.masked_lm, layout="padded", val_fraction=0.4)
    first, again = ([b["labels"] for b in data.load_held_out_batches(9, 4)] for _ in range(2))
    assert [labels.shape[0] for labels in first] == [4, 4, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bert_takes_a_step(path: str) -> None:
    data = text_data(path, _tokenizer(), task=Task.masked_lm, layout="padded", val_path=path)
    batch = next(iter(data.train_dataloader()))
    model = tiny_model("bert")
    loss = model(**batch).loss
    chosen = batch["labels"] != IGNORED
    log_p = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    by_hand = [
        -log_p[row, place, batch["labels"][row, place]] for row, place in chosen.nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model(**batch).loss < loss


@pytest.mark.parametrize(
    ("tokens", "fields", "key"),
    [
        ({"pad_token": "<pad>"}, {}, "model.task"),
        ({"mask_token": "<mask>"}, {}, "model.tokenizer"),
        (
            {"pad_token": "<pad>", "mask_token": "<mask>"},
            {"mlm_probability": 0.0},
            "data.mlm_probability",
        ),
    ],
)
def test_what_cannot_mask_is_refused(
    tokens: dict[str, str], fields: dict[str, float], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_collator(word_tokenizer(**tokens), data_config(path="", **fields), Task.masked_lm)
    assert caught.value.key == key


def test_packed_windows_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.layout: packed windows need causal_lm"):
        text_data(path, _tokenizer(), task=Task.masked_lm).setup()


def test_a_window_without_room_is_refused(path: str) -> None:
    data = text_data(path, _tokenizer(), task=Task.masked_lm, layout="padded", seq_len=2)
    with pytest.raises(ConfigError, match=r"data\.seq_len.*\n.*\n  valid: at least 3"):
        data.setup()
