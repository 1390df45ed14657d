"""`sliding_window`: the model with a window is the model under an explicit band mask."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgery.errors import ConfigError, PlanError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from surgery.plan.sizes import count_kv_bytes
from tests.families import HEADS, VOCAB, family

WINDOW, LENGTH, BATCH = 5, 17, 2
# Eager attention takes its softmax in fp32.
EAGER = 1e-5
NO_SDPA = {"gemma2", "gpt_oss"}
# Name → options that its config can say, and the windows that follow.
CASES: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "mistral, another size": ("mistral", {}, [5, 5]),
    "mistral without": ("mistral_wide", {}, [5, 5]),
    "mixtral": ("mixtral", {}, [5, 5]),
    "starcoder2": ("starcoder2", {}, [5, 5]),
    "qwen2": ("qwen2", {}, [5, 5]),
    "qwen2, one layer": ("qwen2", {"layers": [1]}, [None, 5]),
    "qwen3, one layer": ("qwen3", {"layers": [0]}, [5, None]),
    "qwen3_moe": ("qwen3_moe", {}, [5, 5]),
    "smollm3": ("smollm3", {}, [5, 5]),
    "gemma2": ("gemma2", {}, [5, 5]),
    "gemma3, where it has one": ("gemma3_mixed", {"layers": [0]}, [5, None]),
    "cohere2, where it has one": ("cohere2_mixed", {"layers": [0]}, [5, None]),
    "gpt_oss": ("gpt_oss", {}, [5, 5]),
    "llama": ("llama", {}, [5, 5]),
}


def plan_window(model: PreTrainedModel, size: int | None = WINDOW, **options: Any) -> Plan:
    return make_plan(model, parse_operations({"sliding_window": {"size": size, **options}}))


def feed(padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -4:] = 0  # a row that sees nothing has no softmax
    return {"input_ids": ids, "attention_mask": mask}


def band(window: int | None, real: torch.Tensor) -> torch.Tensor:
    """[B, 1, N, N]: 0 where a query sees a key, the lowest number elsewhere."""
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    seen = columns <= rows
    if window is not None:
        seen = seen & (columns > rows - window)
    seen = seen[None, None] & real[:, None, None, :].bool()
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(
        ~seen, torch.finfo(torch.float64).min
    )


@torch.no_grad()
def logits_under(
    model: PreTrainedModel, windows: Mapping[str, int | None], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The oracle: what a model gives when its own mask is replaced in every block."""

    def replace(window: int | None) -> Any:
        mask = band(window, inputs["attention_mask"])

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(replace(window), with_kwargs=True)
        for path, window in windows.items()
    ]
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def make_model(name: str, attention: str = "eager") -> PreTrainedModel:
    """In fp64; a name that ends on ``_mixed`` has one layer with a window and one without."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"]}
    plain = name.removesuffix("_mixed")
    model = family(plain, **(mixed if plain != name else {}))
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_under_a_band_mask(case: str, padded: bool) -> None:
    name, options, windows = CASES[case]
    inputs, original = feed(padded), make_model(name)
    sites = find_sites(original).sites
    expected = logits_under(
        original, dict(zip([s.path for s in sites], windows, strict=True)), inputs
    )
    model = copy.deepcopy(original)
    plan = plan_window(model, **options)
    assert [site.window for site in plan.after] == windows
    model = apply_(model, plan)
    with torch.no_grad():
        actual = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= EAGER
    if any(site.window != window for site, window in zip(sites, windows, strict=True)):
        with torch.no_grad():
            before = original(**inputs, use_cache=False).logits
        assert (actual - before)[real].abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_read_again_it_is_the_same(case: str, tmp_path: Path) -> None:
    name, options, _ = CASES[case]
    model = make_model(name).float()
    model = apply_(model, plan_window(model, **options)).eval()
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    for key in ("sliding_window", "layer_types"):
        assert getattr(read.config, key, None) == getattr(model.config, key, None)
    inputs = feed(padded=False)
    with torch.no_grad():
        logits = [each(**inputs, use_cache=False).logits for each in (model, read)]
    assert (logits[0] - logits[1]).abs().max() <= EAGER


@pytest.mark.parametrize("case", CASES)
def test_decoding_past_the_window_is_the_same(case: str) -> None:
    """The cache holds fewer tokens than were seen by then."""
    name, options, _ = CASES[case]
    model = make_model(name, "eager" if name in NO_SDPA else "sdpa")
    model = apply_(model, plan_window(model, **options))
    ids = feed(padded=False)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :7], use_cache=True)
        parts = [out.logits]
        for at in range(7, LENGTH):
            cache = out.past_key_values
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
    bound = EAGER if name in NO_SDPA else 1e-12
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= bound


@pytest.mark.parametrize("tokens", [3, 4, 5, 16])
@pytest.mark.parametrize("case", ["llama", "qwen2, one layer", "gemma2"])
def test_planned_bytes_are_those_of_the_cache(case: str, tokens: int) -> None:
    name, options, _ = CASES[case]
    model = make_model(name)
    operations = parse_operations({"sliding_window": {"size": WINDOW, **options}})
    plan = make_plan(model, operations, tokens=tokens, kv_bytes=8)
    model = apply_(model, plan)
    ids = feed(padded=False)["input_ids"][:1, :tokens]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for la in cache.layers for t in (la.keys, la.values))
    assert held == plan.sizes_after.kv_bytes == count_kv_bytes(plan.after, tokens, 8)
    assert (plan.sizes_after.kv_bytes < plan.sizes_before.kv_bytes) == (tokens >= WINDOW)


def test_flops_count_the_pairs_that_are_seen() -> None:
    model = make_model("llama")
    operations = parse_operations({"sliding_window": {"size": WINDOW}})
    plan = make_plan(model, operations, tokens=LENGTH)
    outside = LENGTH - WINDOW
    saved = sum(4 * outside**2 * site.q_heads * site.head_dim // 2 for site in plan.before)
    assert plan.sizes_before.attention_flops - plan.sizes_after.attention_flops == saved


def test_a_llama_becomes_a_mistral() -> None:
    plan = plan_window(make_model("llama"))
    assert plan.conversion == {"into": "mistral", "positions": None}
    assert plan.export.format == "converted"
    assert plan.config_patch == {"sliding_window": WINDOW}
    assert "window" in next(iter(plan.layers.values()))


def test_null_takes_the_window_away() -> None:
    model = make_model("mistral")
    plan = plan_window(model, None)
    assert [site.window for site in plan.after] == [None, None]
    inputs = feed(padded=False)
    expected = logits_under(model, {s.path: None for s in plan.before}, inputs)
    model = apply_(model, plan)
    with torch.no_grad():
        assert (model(**inputs, use_cache=False).logits - expected).abs().max() <= EAGER


def test_a_window_that_is_there_changes_nothing() -> None:
    plan = plan_window(make_model("mistral"), 6)
    assert not plan.changes_anything
    assert plan.notes == ("sliding_window: the model has this window already",)
    assert not plan_window(make_model("llama"), None).changes_anything


@pytest.mark.parametrize(
    ("name", "options", "key", "problem"),
    [
        ("gemma3_mixed", {}, ".layers", "different rotary positions"),
        ("cohere2_mixed", {}, "", "rotary positions only with a window"),
        ("cohere2_mixed", {"size": None}, "", "rotary positions unless it is with a window"),
        ("gemma2", {"layers": [1]}, ".layers", "one window for all layers"),
        ("mixtral", {"layers": [1]}, ".layers", "one window for all layers"),
        ("llama", {"layers": [1]}, "", "can be converted to mistral"),
        ("llama_biased", {}, "", "mistral: attention_bias"),
        ("olmo2", {}, "", "cannot say a window"),
        ("mistral", {"size": 1}, ".size", "must be at least 2"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(
    name: str, options: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        plan_window(make_model(name), **{"size": WINDOW, **options})
    assert caught.value.key == f"attention.sliding_window{key}"
    assert caught.value.valid


def test_second_on_a_llama_it_says_that_it_must_be_first() -> None:
    operations = parse_operations({"gqa": {"kv_heads": 2}, "sliding_window": {"size": WINDOW}})
    with pytest.raises(ConfigError, match="can be converted to mistral") as caught:
        make_plan(make_model("llama"), operations)
    assert caught.value.valid is not None
    assert "first" in caught.value.valid
    plan = make_plan(make_model("llama"), operations[::-1])
    assert [(site.kv_heads, site.window) for site in plan.after] == [(2, WINDOW)] * 2


def test_a_model_that_does_not_follow_its_config_is_left_alone() -> None:
    """The check on the live model, before anything is changed."""
    model = make_model("mistral_wide")
    plan = plan_window(model)
    model.model.config = copy.deepcopy(model.config)  # what makes the masks hears of no change
    with pytest.raises(PlanError, match="not the model under a mask that hides the same keys"):
        apply_(model, plan)
    assert model.config.sliding_window is None


REMOVED = {"heads": {1: list(range(HEADS))}, "remove_attention": True}


@pytest.mark.parametrize(
    "attention",
    [
        {"prune_heads": REMOVED, "sliding_window": {"size": WINDOW}},
        {"sliding_window": {"size": WINDOW}, "prune_heads": REMOVED},
    ],
    ids=["removed before", "removed after"],
)
def test_beside_a_layer_without_attention(attention: dict[str, Any]) -> None:
    original = make_model("mistral")
    first, second = (site.path for site in find_sites(original).sites)
    inputs = feed(padded=False)
    model = copy.deepcopy(original)
    model = apply_(model, make_plan(model, parse_operations(attention)))
    with torch.no_grad():
        actual = model(**inputs, use_cache=False).logits

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return torch.zeros_like(output[0]), *output[1:]

    handle = original.get_submodule(second).register_forward_hook(silence)
    expected = logits_under(original, {first: WINDOW, second: None}, inputs)
    handle.remove()
    assert (actual - expected).abs().max() <= EAGER


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_a_result_that_is_read_again_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    plan = plan_window(model)
    apply_(model, plan).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    before = copy.deepcopy(read.state_dict())
    assert apply_(read, plan) is read
    assert all(torch.equal(before[name], value) for name, value in read.state_dict().items())


def test_another_model_with_the_same_window_is_not_the_result() -> None:
    attention = {"sliding_window": {"size": WINDOW}, "rope": {"type": "linear", "factor": 2.0}}
    model = make_model("mistral")
    plan = make_plan(model, parse_operations(attention))
    other = apply_(copy.deepcopy(model), plan_window(model))
    with pytest.raises(PlanError, match="not the model the plan was made for"):
        apply_(other, plan)


def test_a_probe_may_say_what_the_check_says_too() -> None:
    model = make_model("mistral")
    probe = {"input_ids": feed(padded=False)["input_ids"], "use_cache": True}
    apply_(model, plan_window(model), probe=probe)
    assert model.config.sliding_window == WINDOW
