"""A part of a batch stays a batch: every tensor is cut alike, or none is."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from surgery.verify.excerpt import cut_excerpt
from tests.verify.batches import packed, padded


def test_rows_and_tokens_are_cut_out_of_every_tensor() -> None:
    batch = padded(rows=5, length=12)
    part = cut_excerpt(batch, encoder_decoder=False, rows=2, tokens=8)
    assert part is not None
    assert part.text == "2 of 5 rows, 8 of 12 tokens"
    assert set(part.inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(part.inputs["input_ids"], batch["input_ids"][:2, :8])
    assert torch.equal(part.inputs["attention_mask"], batch["attention_mask"][:2, :8])
    assert part.real is not None
    assert torch.equal(part.real, batch["attention_mask"][:2, :8].bool())


def test_where_padding_comes_first_the_last_tokens_are_taken() -> None:
    batch = padded("left", rows=3, length=12)
    batch = {name: value[1:] for name, value in batch.items()}
    part = cut_excerpt(batch, encoder_decoder=False, tokens=4)
    assert part is not None
    assert torch.equal(part.inputs["input_ids"], batch["input_ids"][:, -4:])
    assert part.real is not None
    assert part.real.all()


def test_positions_of_packed_rows_are_cut_too() -> None:
    batch = packed(rows=4)
    part = cut_excerpt(batch, encoder_decoder=False, rows=1, tokens=6)
    assert part is not None
    assert part.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert part.real is None


def test_masks_and_positions_of_more_dimensions() -> None:
    batch = {
        "input_ids": torch.zeros(4, 10, dtype=torch.long),
        "attention_mask": torch.zeros(4, 1, 10, 10),
        "position_ids": torch.zeros(3, 4, 10, dtype=torch.long),
    }
    part = cut_excerpt(batch, encoder_decoder=False, rows=2, tokens=6)
    assert part is not None
    assert part.inputs["attention_mask"].shape == (2, 1, 6, 6)
    assert part.inputs["position_ids"].shape == (3, 2, 6)


def test_one_row_for_all_stays_one_row() -> None:
    batch = {
        "input_ids": torch.zeros(4, 6, dtype=torch.long),
        "position_ids": torch.arange(6)[None],
    }
    part = cut_excerpt(batch, encoder_decoder=False)
    assert part is not None
    assert part.inputs["position_ids"].shape == (1, 6)


def test_embeddings_are_cut_by_position_even_where_they_are_as_wide_as_long() -> None:
    part = cut_excerpt({"inputs_embeds": torch.zeros(3, 8, 8)}, encoder_decoder=False, tokens=5)
    assert part is not None
    assert part.inputs["inputs_embeds"].shape == (2, 5, 8)


def test_what_is_not_known_keeps_the_batch_whole() -> None:
    batch = {
        "input_ids": torch.zeros(4, 6, dtype=torch.long),
        "cu_seq_lens_q": torch.tensor([0, 3, 6]),
    }
    part = cut_excerpt(batch, encoder_decoder=False, tokens=2)
    assert part is not None
    assert part.text == "the whole batch"
    assert part.inputs["input_ids"].shape == (4, 6)


def test_images_are_cut_by_rows() -> None:
    part = cut_excerpt({"pixel_values": torch.zeros(5, 3, 8, 8)}, encoder_decoder=False)
    assert part is not None
    assert part.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert part.text == "2 of 5 rows"


def test_labels_stay_where_a_decoder_reads_them() -> None:
    batch = {
        "input_ids": torch.zeros(4, 6, dtype=torch.long),
        "labels": torch.tensor([[3, 4, -100]] * 4),
    }
    part = cut_excerpt(batch, encoder_decoder=True, tokens=5)
    assert part is not None
    assert part.inputs["labels"].shape == (2, 3)
    assert part.real is not None
    assert part.real.tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_step_of_generation_is_left_out_and_a_prompt_is_not(name: str) -> None:
    """The name is that of the installed transformers."""
    cache = DynamicCache()
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        name: cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    part = cut_excerpt(batch, encoder_decoder=False)
    assert part is not None
    assert set(part.inputs) == {"input_ids"}
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    assert cut_excerpt(batch, encoder_decoder=False) is None
    assert cut_excerpt({}, encoder_decoder=False) is None
