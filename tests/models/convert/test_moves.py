"""Moves lay tensors out anew and lose nothing: each has a way back, to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from surgery.models.convert import Move, map_tensors, reverse_move, run_move

from .moving import ALL, model_of


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_every_move_of_every_pair_goes_back_to_the_bit(name, into, positions) -> None:
    tensors = dict(model_of(name, torch.float32).named_parameters())
    for move in map_tensors(model_of(name).config, into, positions):
        sources = [tensors[name] for name in move.sources]
        back = run_move(reverse_move(move), run_move(move, sources))
        assert len(back) == len(sources)
        assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True))


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_a_map_is_plain_json(name, into, positions) -> None:
    moves = map_tensors(model_of(name).config, into, positions)
    again = [Move.from_json(json.loads(json.dumps(move.to_json()))) for move in moves]
    assert again == moves


@pytest.mark.parametrize(("name", "into", "positions"), ALL)
def test_no_tensor_is_named_twice(name, into, positions) -> None:
    moves = map_tensors(model_of(name).config, into, positions)
    for names in (
        [name for move in moves for name in move.sources],
        [name for move in moves for name in move.results],
    ):
        assert len(set(names)) == len(names)


def test_parts_of_the_wrong_size_are_refused() -> None:
    move = Move("concat", ("a", "b"), ("c",), {"sizes": [2, 3]})
    with pytest.raises(ValueError, match=r"have \[3, 2\] rows"):
        run_move(move, [torch.ones(3, 1), torch.ones(2, 1)])
