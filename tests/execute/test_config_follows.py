"""A changed config reaches the live model: it is what a fresh model of that config is.

On every causal model type that transformers maps, attribute by attribute and buffer by buffer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.coverage import zoo
from surgery.config.options import option
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.config import get_key, list_config_prefixes
from surgery.models.reference import ReferenceModels
from surgery.models.sites import find_sites
from surgery.plan.draft import Draft
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation

TYPES = zoo.model_types("causal-lm")
# Key → what it is changed to, where a config has it and takes it.
CHANGES: dict[str, Any] = {
    "attention_dropout": 0.25,
    "attn_pdrop": 0.25,
    "attention_probs_dropout_prob": 0.25,
    "resid_pdrop": 0.375,
    "hidden_dropout_prob": 0.375,
    "dropout": 0.375,
    "sliding_window": 7,
    "rms_norm_eps": 1e-3,
    "layer_norm_eps": 1e-3,
    "layer_norm_epsilon": 1e-3,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 5,
    "hidden_act": "relu",
    "activation_function": "relu",
    "logit_scale": 0.5,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.5,
}


@dataclass
class PatchConfig(Operation):
    """A test's own operation: dotted config keys and their values, and nothing else."""

    name = "patch_config_in_a_test"

    keys: Any = option(None, "key: value")

    def plan(self, draft: Draft) -> None:
        for key, value in self.keys.items():
            draft.set_config(key, value)


def find_changes(model: PreTrainedModel) -> dict[str, Any]:
    """The changes that this architecture takes, all at once."""
    config, references = model.config, ReferenceModels(model)
    found: dict[str, Any] = {}
    for prefix in list_config_prefixes(config):
        for name, value in CHANGES.items():
            now = get_key(config, f"{prefix}{name}")
            if now is None or isinstance(now, bool) or type(now) not in (int, float, str):
                continue
            try:
                references.find_attributes({**found, f"{prefix}{name}": value})
            except ConfigError:
                continue
            found[f"{prefix}{name}"] = value
        rope = get_key(config, f"{prefix}rope_parameters")
        if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), (int, float)):
            found[f"{prefix}rope_parameters"] = {**rope, "rope_theta": 2 * rope["rope_theta"]}
    return found


def describe(module: nn.Module) -> dict[str, Any]:
    """What a module is besides its parameters, its children and its config."""
    held = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    return {"type": type(module).__name__, **held}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    if isinstance(value, dict):
        return all(_is_plain(one) for one in value.values())
    return isinstance(value, (bool, int, float, str, type(None)))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_live_model_is_the_fresh_one(model_type: str) -> None:
    if ("causal-lm", model_type) in zoo.UNBUILDABLE:
        pytest.skip("cannot be built here")
    model = zoo.tiny_model("causal-lm", model_type)
    anatomy = find_sites(model)
    if anatomy.unreadable or not anatomy.sites:
        pytest.skip("its attention is not operated on")
    keys = find_changes(model)
    if not keys:
        pytest.skip("its config has none of the keys")
    before = {path: describe(module) for path, module in model.named_modules()}
    expected = ReferenceModels(model).find_attributes(
        {key: value for key, value in keys.items() if not key.endswith("rope_parameters")}
    )
    live = apply_(model, make_plan(model, [PatchConfig(keys)]))
    fresh = build(type(model), live.config)
    paths = dict(fresh.named_modules())
    assert list(dict(live.named_modules())) == list(paths)
    for path, module in live.named_modules():
        assert describe(module) == describe(paths[path]), path
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                assert torch.equal(buffer, paths[path].get_buffer(name)), f"{path}.{name}"
    for path in expected:  # or both models missed the same key
        assert describe(paths[path]) != before[path], path


def build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return kind(copy.deepcopy(config)).eval()
    finally:
        torch.set_rng_state(state)


def test_a_key_that_would_add_modules_with_weights_is_refused() -> None:
    model = zoo.tiny_model("causal-lm", "llama")
    with pytest.raises(ConfigError, match="attention_bias"):
        make_plan(model, [PatchConfig({"attention_bias": True})])
