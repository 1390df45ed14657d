"""Attention sinks count more: which positions they are, and what that changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from surgery.calibration.sinks import SHARE, weigh_positions
from surgery.calibration.site_batches import SiteBatches
from surgery.calibration.stream import open_streams
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import find_sites
from surgery.models.stack import find_stack
from surgery.operations.prune_heads.refit import refit_sites
from tests.calibration.models import batches, made
from tests.calibration.pruned import OPTIONS

TOKEN = 5


@torch.no_grad()
def make_huge_(model: PreTrainedModel) -> PreTrainedModel:
    """Let the stream of one token be much larger than that of all others."""
    embeddings = model.get_input_embeddings().weight
    embeddings[TOKEN] = 3000 * embeddings.std() * torch.linspace(-1, 1, embeddings.shape[1])
    return model


def with_sinks(count: int = 6) -> list[dict[str, torch.Tensor]]:
    data = batches(count)
    for batch in data:
        batch["input_ids"][batch["input_ids"] == TOKEN] = TOKEN + 1
        batch["input_ids"][:, 0] = TOKEN
    return data


def weigh(model: PreTrainedModel, data: list[Any]) -> list[torch.Tensor]:
    return weigh_positions(model, find_stack(model, find_sites(model).sites), data)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert"])
def test_all_sinks_together_count_a_share_of_the_others(kind: str) -> None:
    data = with_sinks()
    if kind == "bert":  # the norm after its embeddings makes all alike
        assert weigh(make_huge_(made(kind, dtype=torch.float32)), data) == []
        return
    weights = torch.cat(weigh(make_huge_(made(kind, dtype=torch.float32)), data))
    assert torch.equal(weights[:, 1:], torch.ones_like(weights[:, 1:]))
    assert float(weights[:, 0].sum()) == pytest.approx(SHARE * weights[:, 1:].numel())


def test_without_sinks_all_count_alike() -> None:
    assert weigh(made("llama", dtype=torch.float32), batches()) == []


def test_many_sinks_count_enough() -> None:
    data = batches()
    for batch in data:
        batch["input_ids"][:, ::4] = TOKEN
    assert weigh(make_huge_(made("llama", dtype=torch.float32)), data) == []


def test_padding_is_no_sink() -> None:
    data = with_sinks()
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, 0] = 0
    assert weigh(make_huge_(made("llama", dtype=torch.float32)), data) == []


@torch.no_grad()
def measure_error_at_first(weight: float) -> float:
    """Refit pruned layers, first positions counting so much; measure their error on other text."""
    model = made("llama", dtype=torch.float32)
    sites, data = find_sites(model).sites, with_sinks(8)
    left = {site.path: list(range(2, 8)) for site in sites}
    weights = [torch.ones(batch["input_ids"].shape) for batch in data[:6]]
    for one in weights:
        one[:, 0] = weight
    pruned = refit_sites(model, sites, left, data[:6], OPTIONS, weights).model
    text = SiteBatches(*open_streams((model, pruned), sites, data[6:]), sites[1], 0)
    error = 0.0
    for view, aim in text.iterate_aims():
        assert view.output is not None
        missing = (aim.target - view.output) * aim.scale[..., None]
        error += float(missing[:, 0].square().mean())
    return error


def test_what_counts_more_is_closer_after_a_refit() -> None:
    assert measure_error_at_first(100.0) < 0.5 * measure_error_at_first(1.0)


def test_the_decision_is_that_of_the_original() -> None:
    model = make_huge_(made("llama", dtype=torch.float32))
    sites, data = find_sites(model).sites, with_sinks()
    original, working = open_streams((model, make_sharing_copy(model)), sites, data)
    assert original.weights is working.weights
    assert len(original.weights) == len(data)
