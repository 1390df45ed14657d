"""Under flash attention masks are 2-D or missing: the rows follow what the kernel is told.

The oracle is the kernel's own output: softmax of the row logits times the values must be it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from surgery.observe import AttentionCall
from surgery.observe.rows import compute_row_logits
from tests.observe import reference_flash
from tests.observe.explicit import assert_close, entropies, recorded_calls
from tests.tiny_models import tiny_model, tokens

LENGTH = 12
PACKED = torch.cat([torch.arange(5), torch.arange(1), torch.arange(6)])


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    reference_flash.install(monkeypatch)


def assert_rows_give_the_output(call: AttentionCall, real: torch.Tensor | None = None) -> None:
    assert call.implementation == "flash_attention_2"
    logits = compute_row_logits(call, torch.arange(call.query.shape[2]))
    group = call.query.shape[1] // call.value.shape[1]
    got = (logits.softmax(-1) @ call.value.repeat_interleave(group, 1)).transpose(1, 2)
    if real is None:
        real = torch.ones(got.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(got[real], call.output[real], atol=1e-5, rtol=0)


def padding_mask(side: str) -> torch.Tensor:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if side == "right":
        mask[0, 5:], mask[2, 11:] = 0, 0
    if side == "left":
        mask[0, :5], mask[2, :1] = 0, 0
    return mask


# mistral has a causal window, modernbert one to both sides.
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "modernbert"])
def test_padding(name: str, side: str) -> None:
    model = reference_flash.use_flash(tiny_model(name, "eager"))
    mask = padding_mask(side)
    calls = recorded_calls(model, input_ids=tokens(3, LENGTH), attention_mask=mask)
    assert len(calls) == 2
    for call in calls:
        assert call.mask is None if side == "none" else call.mask.ndim == 2
        assert_rows_give_the_output(call, mask.bool())


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuation_with_a_cache(name: str, new: int, side: str) -> None:
    model = reference_flash.use_flash(tiny_model(name))
    mask, ids = padding_mask(side), tokens(3, LENGTH)
    cache = DynamicCache()  # it keeps all keys: the window has to be applied by the kernel
    start = LENGTH - new
    recorded_calls(
        model, input_ids=ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache
    )
    for call in recorded_calls(
        model, input_ids=ids[:, start:], attention_mask=mask, past_key_values=cache
    ):
        assert call.key.shape[2] == LENGTH
        assert_rows_give_the_output(call)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_documents_in_a_batch_of_one(name: str) -> None:
    batch = {"input_ids": tokens(1, LENGTH), "position_ids": PACKED[None], "use_cache": False}
    flash = recorded_calls(reference_flash.use_flash(tiny_model(name)), **batch)
    sdpa = recorded_calls(tiny_model(name), **batch)
    for call, separate in zip(flash, sdpa, strict=True):
        assert_rows_give_the_output(call)
        assert_close(entropies(call), entropies(separate))


def test_packed_documents_in_a_larger_batch_are_not_kept_apart() -> None:
    """What transformers does there, and so what the rows must say."""
    model = reference_flash.use_flash(tiny_model("llama"))
    batch = {"input_ids": tokens(2, LENGTH), "position_ids": PACKED.expand(2, -1)}
    for call in recorded_calls(model, **batch, use_cache=False):
        assert_rows_give_the_output(call)
        last = compute_row_logits(call, torch.tensor([LENGTH - 1]))
        assert torch.isfinite(last).all()  # it sees the first document too


def test_packed_documents_by_their_bounds() -> None:
    """cu_seq_lens, as DataCollatorWithFlattening gives them; here over a batch of two."""
    model = reference_flash.use_flash(tiny_model("llama"))
    bounds = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    batch = {"input_ids": tokens(2, LENGTH), "use_cache": False}
    lengths = {"max_length_q": 8, "max_length_k": 8}
    for call in recorded_calls(
        model, **batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **lengths
    ):
        assert_rows_give_the_output(call)
