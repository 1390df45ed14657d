"""How far a changed model's predictions are from the original's."""

from __future__ import annotations

import pytest
import torch

from surgery.calibration import divergence
from surgery.calibration.divergence import Divergence
from surgery.calibration.stream import Stream
from surgery.errors import ConfigError
from tests.families import family, tokens


@pytest.mark.parametrize("kept", [0, divergence.KEPT])
def test_divergence_is_what_it_says(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "KEPT", kept)
    model, other = family("llama"), family("llama", seed=1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": tokens(2, 6), "attention_mask": mask, "labels": tokens(2, 6)}
    original = Divergence(Stream(model, [batch]), 1)
    assert original.measure(Stream(model, [batch])) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
        p, q = (one(**inputs).logits.softmax(-1)[mask.bool()] for one in (model, other))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert original.measure(Stream(other, [batch])) == pytest.approx(expected, rel=1e-4)


def test_only_the_first_batches_are_measured() -> None:
    model, other = family("llama"), family("llama", seed=1)
    batches = [{"input_ids": tokens(2, 6, seed)} for seed in (0, 1)]
    first = Divergence(Stream(model, batches), 1).measure(Stream(other, batches))
    alone = Divergence(Stream(model, batches[:1]), 5).measure(Stream(other, batches[:1]))
    both = Divergence(Stream(model, batches), 2).measure(Stream(other, batches))
    assert first == alone != both


def test_predictions_that_are_no_numbers() -> None:
    model, other = family("llama"), family("llama")
    batch = {"input_ids": tokens(2, 6)}
    original = Divergence(Stream(model, [batch]), 1)
    with torch.no_grad():
        other.lm_head.weight[0] = float("nan")
    with pytest.raises(ConfigError, match="not all numbers") as caught:
        original.measure(Stream(other, [batch]))
    assert caught.value.key == "data"
