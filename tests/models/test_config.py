"""Keys of a config, set for a while or for good."""

from __future__ import annotations

import copy

import pytest

from surgery.models.config import apply_patch, patched
from tests.execute.test_towers import gemma3
from tests.families import family_config


def test_what_is_patched_for_a_while_is_as_it_was_afterwards() -> None:
    """A key that was not there too: `head_dim: null` is another config than one without it."""
    config = family_config("qwen2")
    assert not hasattr(config, "head_dim")
    before, state = config.to_dict(), dict(vars(config))

    def fail() -> None:
        with patched(config, {"head_dim": 16, "num_attention_heads": 4}):
            assert (config.head_dim, config.num_attention_heads) == (16, 4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not hasattr(config, "head_dim")
    assert config.to_dict() == before
    assert vars(config) == state


def test_dotted_keys_reach_the_configs_within() -> None:
    config = gemma3().config
    before = copy.deepcopy(config.to_dict())
    with patched(config, {"text_config.num_key_value_heads": 2, "use_cache": False}):
        assert config.text_config.num_key_value_heads == 2
    assert config.to_dict() == before
    apply_patch(config, {"text_config.num_key_value_heads": 2})
    assert config.text_config.num_key_value_heads == 2
