"""Config keys held for a while are gone afterwards, those that were not there before included."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from transformers import AutoConfig

from surgery.models.config import apply_patch, get_key, make_head_count_patch, patching_config
from surgery.models.sites import find_sites
from tests.execute.test_towers import gemma3
from tests.families import family, family_config


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


def test_what_is_patched_for_a_while_is_as_it_was_afterwards() -> None:
    """A key that was not there too: `head_dim: null` is another config than one without it."""
    config = family_config("qwen2")
    assert not hasattr(config, "head_dim")
    before, state = config.to_dict(), dict(vars(config))

    def fail() -> None:
        with patching_config(config, {"head_dim": 16, "num_attention_heads": 4}):
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
    with patching_config(config, {"text_config.num_key_value_heads": 2, "use_cache": False}):
        assert config.text_config.num_key_value_heads == 2
    assert config.to_dict() == before
    apply_patch(config, {"text_config.num_key_value_heads": 2})
    assert config.text_config.num_key_value_heads == 2


def test_no_patch_says_heads_that_each_layer_has_of_its_own() -> None:
    """transformers raises where such a key is read for the whole model."""
    model = family("llama", num_key_value_heads=2)
    sites = find_sites(model).sites
    fewer = [replace(site, kv_heads=1) for site in sites]
    assert make_head_count_patch(model.config, sites, fewer) == {"num_key_value_heads": 1}
    by_layer = type(model.config)(per_layer_config={0: {"num_key_value_heads": 2}})
    with pytest.raises(RuntimeError):
        _ = by_layer.num_key_value_heads
    assert make_head_count_patch(by_layer, sites, fewer) is None
