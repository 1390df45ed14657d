"""Under flex attention the mask is a BlockMask: a function of indices, asked for the rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache

from tests.observe.explicit import (
    assert_close,
    entropies,
    entropy_of,
    explicit_maps,
    recorded_calls,
)
from tests.tiny_models import tiny_model, tokens

LENGTH = 12
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Compiling takes ten seconds a model; the results are the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_every_real_row(name: str, padded: bool) -> None:
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batch = {"input_ids": ids} | ({"attention_mask": mask} if padded else {})
    maps = explicit_maps(tiny_model(name, "eager"), **batch)
    model = tiny_model(name, "flex_attention").eval()
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    for call, explicit in zip(recorded_calls(model, **batch), maps, strict=True):
        assert type(call.mask).__name__ == "BlockMask"
        got, expected = entropies(call).transpose(1, 2), entropy_of(explicit).transpose(1, 2)
        assert_close(got[real], expected[real])


def test_continuation_with_a_cache() -> None:
    ids = tokens(2, LENGTH)
    maps = explicit_maps(tiny_model("llama", "eager"), input_ids=ids)
    model = tiny_model("llama", "flex_attention").eval()
    cache = DynamicCache()
    recorded_calls(model, input_ids=ids[:, :9], past_key_values=cache)
    calls = recorded_calls(model, input_ids=ids[:, 9:], past_key_values=cache)
    for call, explicit in zip(calls, maps, strict=True):
        assert_close(entropies(call), entropy_of(explicit)[:, :, 9:])
