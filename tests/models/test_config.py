"""Config keys held for a while are gone afterwards, those that were not there before included."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from surgery.models.config import get_key, patching_config


@pytest.mark.parametrize(
    ("model_type", "patch"),
    [
        ("phi3", {"num_attention_heads": 2, "head_dim": 4}),  # it has no head_dim of its own
        ("gpt2", {"num_attention_heads": 2, "head_dim": 4}),  # and another name for its heads
        ("gemma3", {"text_config.num_attention_heads": 2, "text_config.made_up": 4}),
    ],
)
def test_a_patch_leaves_no_trace(model_type: str, patch: dict[str, int]) -> None:
    config = AutoConfig.for_model(model_type)
    before = config.to_dict()
    missing = [key for key in patch if get_key(config, key) is None]
    with patching_config(config, patch):
        assert {key: get_key(config, key) for key in patch} == patch
    assert config.to_dict() == before
    assert missing
    for key in missing:
        prefix, _, name = key.rpartition(".")
        assert not hasattr(getattr(config, prefix) if prefix else config, name)
