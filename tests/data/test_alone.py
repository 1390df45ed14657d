"""The proof that packing and padding change nothing: documents give what they give alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.config.schema import Task
from surgery.data.collate import IGNORED, Batch, CausalCollator
from surgery.data.windows import make_windows
from surgery.models.forward import get_forward_options
from tests.data.making import data_config, documents, word_tokenizer
from tests.tiny_models import tiny_model

TOKENIZER = word_tokenizer(eos_token="</s>", pad_token="<pad>")
TEXTS = documents(8)
# Rounding: masked and unmasked attention sum the same numbers in different kernels.
CLOSE = {"rtol": 0, "atol": 2e-5}


def _batch(layout: str, seq_len: int) -> tuple[list[dict[str, Any]], Batch]:
    cfg = data_config(path="", layout=layout, seq_len=seq_len)
    rows = list(
        make_windows(datasets.Dataset.from_dict({"text": TEXTS}), TOKENIZER, cfg, Task.causal_lm)
    )
    return rows, CausalCollator(0)(rows)


@torch.no_grad()
def _logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    inputs.pop("labels", None)
    return model(**inputs, **get_forward_options(model)).logits


def _mean_loss(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Over all predicted tokens of sequences run one by one."""
    losses = [
        F.cross_entropy(_logits(model, input_ids=ids[None])[0, :-1], ids[1:], reduction="none")
        for ids in sequences
    ]
    return torch.cat(losses).mean()


@pytest.fixture(params=["llama-sdpa", "llama-eager", "qwen3-sdpa", "gpt2-sdpa", "gpt2-eager"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    name, attention = request.param.split("-")
    return tiny_model(name, attention).eval()


def _documents_in(batch: Batch) -> list[tuple[int, slice]]:
    """(row, where) of each stretch that `position_ids` keep apart."""
    found = []
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        found += [(row, slice(a, b)) for a, b in pairwise(starts)]
    return found


def test_packed_documents_are_as_alone(model: PreTrainedModel) -> None:
    _, batch = _batch("packed", 16)
    together = _logits(model, **batch)
    apart = _documents_in(batch)
    assert len(apart) > 2 * len(batch["input_ids"])
    for row, where in apart:
        alone = _logits(model, input_ids=batch["input_ids"][row, where][None])[0]
        torch.testing.assert_close(together[row, where], alone, **CLOSE)


def test_packed_loss_is_the_mean_over_documents_alone(model: PreTrainedModel) -> None:
    _, batch = _batch("packed", 16)
    alone = [batch["input_ids"][row, where] for row, where in _documents_in(batch)]
    with torch.no_grad():
        loss = model(**batch, **get_forward_options(model)).loss
    torch.testing.assert_close(loss, _mean_loss(model, alone), **CLOSE)


def test_a_cache_would_let_documents_see_each_other() -> None:
    """Why `get_forward_options` exists; if this fails, transformers has learnt better."""
    model = tiny_model("llama").eval()
    _, batch = _batch("packed", 16)
    with torch.no_grad():
        cached = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert (cached - _logits(model, **batch)).abs().max() > 1e-2


def test_padded_rows_are_as_alone(model: PreTrainedModel) -> None:
    rows, batch = _batch("padded", 16)
    together = _logits(model, **batch)
    for index, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        alone = _logits(model, input_ids=ids[None])[0]
        torch.testing.assert_close(together[index, : len(ids)], alone, **CLOSE)


def test_padded_loss_is_the_mean_over_tokens(model: PreTrainedModel) -> None:
    rows, batch = _batch("padded", 16)
    with torch.no_grad():
        loss = model(**batch, **get_forward_options(model)).loss
    alone = [torch.tensor(row["input_ids"]) for row in rows]
    torch.testing.assert_close(loss, _mean_loss(model, alone), **CLOSE)
    predicted = (batch["labels"][:, 1:] != IGNORED).sum()
    assert predicted == sum(len(ids) - 1 for ids in alone)
