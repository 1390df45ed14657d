"""Whether a model knows a text: the yardstick of token frequencies."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from surgery.config.schema import Task
from surgery.measure.unigram import compute_cross_entropy, compute_unigram_loss, describe_misfit
from tests.data.making import VOCAB, all_rows, documents, text_data, write_texts


def test_frequencies_of_tokens_by_their_definition(tmp_path: Path) -> None:
    """The same as counting by hand, over the tokens that a causal model predicts."""
    path = write_texts(tmp_path / "a.jsonl", documents(60))
    data = text_data(path, layout="padded", val_fraction=0.3)
    train, held_out = (all_rows(data, half) for half in ("train", "held_out"))
    counted = Counter(token for row in train for token in row["input_ids"][1:])
    total, kinds = sum(counted.values()), len(counted)
    seen = [token for row in held_out for token in row["input_ids"][1:]]
    wanted = -sum(math.log((counted[t] + kinds / VOCAB) / (total + kinds)) for t in seen) / len(
        seen
    )
    loss = compute_unigram_loss(data, Task.causal_lm, windows=10**6, vocabulary=VOCAB)
    assert loss == pytest.approx(wanted, rel=1e-9)


def test_the_frequencies_are_probabilities() -> None:
    fitted = torch.tensor([5, 0, 2, 0])
    each = [compute_cross_entropy(fitted, row) for row in torch.eye(4).long()]
    assert sum(math.exp(-one) for one in each) == pytest.approx(1)
    nothing = torch.zeros(4).long()
    assert compute_cross_entropy(nothing, fitted) == pytest.approx(math.log(4))


def test_a_model_that_does_no_better_than_counting_is_named() -> None:
    assert describe_misfit(1.0, 3.0, "data.path") is None
    assert describe_misfit(2.39, 3.0, "data.path") is None
    told = describe_misfit(2.41, 3.0, "data.path")
    assert told is not None
    assert told.startswith("data.path: ")
    assert "2.41" in told
    assert "3.00" in told
    assert "\n" not in told
