"""A patched config reaches a live model: rotary modules are rebuilt, and others replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.execute.config import patch_config_
from surgery.models.config import apply_patch
from surgery.models.reference import ReferenceModels
from tests.families import family, logits, skeleton, tokens
from tests.operations.rope_models import ROTARY_FAMILIES, built_from, draft_of, rope_

YARN = {"type": "yarn", "factor": 2.0}
OTHER = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}


def rotary(model: PreTrainedModel) -> Any:
    return model.model.rotary_emb


def test_editing_the_config_alone_changes_nothing_and_patching_does() -> None:
    model = family("llama")
    before = logits(model)
    edited = family("llama")
    apply_patch(edited.config, OTHER)
    assert torch.equal(logits(edited), before)
    patch_config_(model, OTHER)
    assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), logits(built_from(family("llama"), OTHER)))


@pytest.mark.parametrize("name", ROTARY_FAMILIES)
def test_what_is_said_already_changes_no_bit(name: str) -> None:
    model = family(name)
    before, state = logits(model), dict(vars(rotary(model)))
    for patch in ({}, {"rope_parameters": model.config.rope_parameters}, {"use_cache": True}):
        patch_config_(model, patch)
        assert torch.equal(logits(model), before)
        assert vars(rotary(model)) == state  # the very same objects: it was not rebuilt


@pytest.mark.parametrize("name", ROTARY_FAMILIES)
def test_rebuilding_there_and_back_changes_no_bit(name: str) -> None:
    model = family(name)
    before = logits(model)
    patch = draft_of(model, type="linear", factor=2.0).patch
    back = {key: copy.deepcopy(getattr(model.config, key)) for key in patch}
    patch_config_(model, patch)
    assert not torch.allclose(logits(model), before)
    patch_config_(model, back)
    assert torch.equal(logits(model), before)


def test_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = family("llama").to(torch.bfloat16)
    assert rotary(model).inv_freq.dtype is torch.bfloat16  # what `.to` does to them
    rope_(model, **YARN)
    assert rotary(model).inv_freq.dtype is torch.float32
    exact = rotary(rope_(family("llama", dtype=torch.float32), **YARN)).inv_freq
    assert torch.equal(rotary(model).inv_freq, exact)


def test_modules_keep_their_identity_and_hooks() -> None:
    model = family("llama")
    module, calls = rotary(model), []
    module.register_forward_hook(lambda *_: calls.append(1))
    rope_(model, **YARN)
    assert rotary(model) is module
    logits(model)
    assert calls == [1]
    assert module.rope_type == "yarn"


def test_state_of_a_dynamic_type_does_not_stay() -> None:
    model = rope_(family("llama"), type="dynamic", factor=2.0)
    logits(model, tokens(1, 100))  # grows the frequencies
    rope_(model, type="default")
    assert torch.equal(logits(model), logits(family("llama")))


def test_on_the_meta_device() -> None:
    model = skeleton(family("llama"))
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    patch_config_(model, {"rope_parameters": linear})
    assert rotary(model).rope_type == "linear"
    assert rotary(model).inv_freq.is_meta


def test_training_mode_stays() -> None:
    model = family("llama").train()
    rope_(model, **YARN)
    assert all(module.training for module in model.modules())


def test_modules_of_another_kind_take_their_place() -> None:
    model = family("llama").train()
    patch = {"hidden_act": "relu"}
    expected = built_from(model, patch)
    patch_config_(model, patch)
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval()), logits(expected))


def test_models_that_are_patched_from_the_same_references_share_no_module() -> None:
    model, copied = family("llama").eval(), family("llama").train()
    references, patch = ReferenceModels(model), {"hidden_act": "relu"}
    patch_config_(copied, patch, references)
    patch_config_(model, patch, references)
    reference = references.get(patch)
    assert not {*model.modules()} & {*copied.modules(), *reference.modules()}
    assert not any(module.training for module in (*model.modules(), *reference.modules()))


def test_what_cannot_be_built_is_refused() -> None:
    model = family("llama")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4}  # without its factor
    before = model.config.to_dict()
    with pytest.raises(PlanError, match=r"llama does not accept rope_parameters=.*factor"):
        patch_config_(model, {"rope_parameters": yarn})
    assert model.config.to_dict() == before
