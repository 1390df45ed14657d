"""Random operations, one after the other, on random small models: against an original's weights
rewritten in their own shapes, saved and read back, and against the sizes that were planned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.operations.fuse_qkv.projections import unfuse_qkv_
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.execute.sequences import OPERATIONS, Original
from tests.families import VOCAB, logits, randomised, tokens
from tests.operations.drafts import drafted

TOKENS = 7
# A failing case is small enough as it is; to shrink it would take minutes.
PHASES = [Phase.explicit, Phase.generate]

WHOLE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
# Type → which config keys hold its sizes, what else it needs, and what it takes.
BOTH = ("gqa", "prune_heads", "attention_dropout")
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"attention_bias": True, "intermediate_size": 12}, (*BOTH, "rope")),
    "qwen3": ({"intermediate_size": 12}, (*BOTH, "rope")),
    "stablelm": ({"intermediate_size": 12, "qk_layernorm": True, "rope_parameters": WHOLE}, BOTH),
    "gpt2": ({"n_inner": 12}, BOTH),
    "phi3": ({"intermediate_size": 12}, (*BOTH, "rope")),
    "bert": ({"is_decoder": True, "intermediate_size": 12}, BOTH),
    "opt": ({"ffn_dim": 12}, ("prune_heads", "attention_dropout")),
    "gpt_neox": (
        {"intermediate_size": 12, "rotary_pct": 1.0},
        ("prune_heads", "attention_dropout", "rope"),
    ),
}
# What may come last: it lives as long as the model does, and is undone when it is saved.
LAST = {"llama": "fuse_qkv", "qwen3": "fuse_qkv", "opt": "fuse_qkv", "bert": "fuse_qkv"}
GROUPED = {"llama", "qwen3", "phi3", "stablelm"}


@dataclass
class Case:
    """A model, and operations on it in runs that are planned together."""

    model_type: str
    fields: dict[str, Any]
    attention: str
    operations: list[tuple[str, dict[str, Any], Sequence[Any]]]
    runs: list[list[Operation]]
    reloads: bool

    def model(self) -> PreTrainedModel:
        return built(self.model_type, self.fields, self.attention)


def built(model_type: str, fields: dict[str, Any], attention: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
        **MODELS[model_type][0],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomised(model, 0, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model_type = draw(st.sampled_from(sorted(MODELS)))
    heads, head_dim = draw(st.integers(2, 8)), draw(st.sampled_from([4, 6, 8]))
    fields = {
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
    }
    if model_type == "opt":
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    if model_type in GROUPED:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        fields["num_key_value_heads"] = draw(st.sampled_from(divisors))
    if model_type == "qwen3":
        fields["head_dim"] = head_dim
    attention = draw(st.sampled_from(["eager", "sdpa"]))
    with torch.device("meta"):
        skeleton = built(model_type, fields, attention)
    named = draw(st.lists(st.sampled_from(MODELS[model_type][1]), min_size=1, max_size=4))
    if model_type in LAST and draw(st.booleans()):
        named.append(LAST[model_type])
    operations, specs = [], []
    for name in named:
        sites = drafted(skeleton, *specs).sites
        options = OPERATIONS[name].draw(draw, sites)
        operations.append((name, options, sites))
        specs += parse_operations({name: options})
    cuts = sorted(draw(st.sets(st.integers(1, len(specs) - 1)))) if len(specs) > 1 else []
    bounds = zip([0, *cuts], [*cuts, len(specs)], strict=True)
    runs = [specs[start:end] for start, end in bounds]
    return Case(model_type, fields, attention, operations, runs, draw(st.booleans()))


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    unfuse_qkv_(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        asked = model.config._attn_implementation.removesuffix("_shared_kv")
        return type(model).from_pretrained(folder, attn_implementation=asked).eval()


def performed(case: Case) -> tuple[PreTrainedModel, Plan]:
    """Each run planned and done, and saved and read back before the next, if the case says so."""
    model = case.model()
    for number, run in enumerate(case.runs):
        if case.reloads and number:
            model = reloaded(model)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        config, sites = model.config.to_dict(), find_sites(model)
        try:
            plan = make_plan(model, run, kv_bytes=8)
        except ConfigError as refusal:
            state = model.state_dict()
            assert list(state) == list(before)
            assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
            assert (model.config.to_dict(), find_sites(model)) == (config, sites)
            event(f"{case.model_type} refused: {refusal.problem[:60]}")
            assume(False)
        apply_(model, plan)
    return model, plan


@torch.no_grad()
def cache_bytes(model: PreTrainedModel) -> int:
    cache = model(input_ids=tokens(1, TOKENS), use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(cases())
def test_any_sequence_is_what_its_operations_are(case: Case) -> None:
    original = Original(case.model())
    with torch.no_grad():
        for name, options, sites in case.operations:
            OPERATIONS[name].perform(original, options, sites)
        with original.silenced():
            expected = logits(original.model)
    model, plan = performed(case)
    event(f"{case.model_type}: {plan.export.format}")
    actual = logits(model)
    # Norms and softmax compute in fp32 whatever the weights.
    atol = 1e-6 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    assert sum(p.numel() for p in model.parameters()) == plan.sizes_after.parameters
    assert cache_bytes(model) == TOKENS * plan.sizes_after.kv_bytes_per_token
    again = reloaded(model)
    # Computed again: what was fused is not any more, and three products round otherwise than one.
    assert torch.equal(logits(again), logits(model))
    assert find_sites(again) == find_sites(model)
    assert hasattr(again.config, "quantization_config") == (plan.export.format == "record")
