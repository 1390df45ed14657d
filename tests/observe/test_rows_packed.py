"""Packed documents: each one's rows are those of the document alone."""

from __future__ import annotations

import pytest
import torch

from tests.observe.explicit import (
    assert_close,
    entropies,
    entropy_of,
    explicit_maps,
    recorded_calls,
)
from tests.tiny_models import tiny_model, tokens

LENGTHS = [[5, 1, 6], [8, 4]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_rows_are_those_of_each_document(name: str, attention: str) -> None:
    ids = tokens(2, 12)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    calls = recorded_calls(
        tiny_model(name, attention), input_ids=ids, position_ids=positions, use_cache=False
    )
    alone = tiny_model(name, "eager")
    for index, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            maps = explicit_maps(alone, input_ids=ids[index : index + 1, document])
            for call, explicit in zip(calls, maps, strict=True):
                assert_close(entropies(call)[index, :, document], entropy_of(explicit)[0])
            start += length
