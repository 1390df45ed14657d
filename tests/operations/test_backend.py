"""`backend`: what is really there is chosen, and what is not is refused, before anything runs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.sites import find_sites
from surgery.operations.attention_dropout import AttentionDropout
from surgery.operations.backend.available import Need, find_obstacle, list_available
from surgery.operations.backend.operation import Backend
from surgery.plan.registry import parse_operations
from surgery.verify.first_batch import _counting
from tests.families import FAMILIES, family_config
from tests.operations.drafts import drafted
from tests.operations.dropout_models import NAMES, OWN_ATTENTION, base_model, run

CUDA = torch.cuda.is_available()


def skeleton(name: str, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(name, **fields), dtype=dtype)


def test_fast_on_a_cpu_is_sdpa_and_says_why() -> None:
    draft = drafted(skeleton("llama"), Backend("fast"))
    assert draft.notes == [
        "attention backend: sdpa (flash_attention_4, flash_attention_3, flash_attention_2: "
        "needs CUDA)"
    ]
    (step,) = draft.steps
    assert (step.operation, step.kind, step.recorded) == ("backend", "backend", False)
    assert draft.implementation == "sdpa"
    assert dict(step.arguments) == {"implementation": "sdpa", "check": True, "tolerance": None}
    assert draft.patch == {}


def test_fast_goes_on_to_eager_where_sdpa_would_leave_something_out() -> None:
    with torch.device("meta"):
        config = family_config("gemma2")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draft = drafted(model, Backend("fast"))
    assert draft.steps[0].arguments["implementation"] == "eager"
    assert "sdpa: " in draft.notes[0]


def test_fast_for_a_gpu_names_what_is_missing() -> None:
    """Planned where there is no GPU, or where there is one: the packages are missing here."""
    draft = drafted(skeleton("llama", torch.bfloat16), Backend("fast"), device="cuda")
    assert draft.steps[0].arguments["implementation"] == "sdpa"
    assert "flash_attention_2: not installed" in draft.notes[0]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_by_name_needs_its_own_package(name: str) -> None:
    model = skeleton("mistral_wide", torch.bfloat16)
    with pytest.raises(ConfigError) as caught:
        drafted(model, Backend(name), device="cuda")
    assert caught.value.key == "attention.backend.implementation"
    assert caught.value.problem == "not installed"
    assert caught.value.valid == "eager, flex_attention, sdpa, fast"
    with pytest.raises(ConfigError, match="needs CUDA"):
        drafted(skeleton("llama"), Backend(name))


def test_a_hub_kernel_needs_the_kernels_package() -> None:
    from transformers.utils import is_kernels_available

    if is_kernels_available():
        pytest.skip("kernels is installed here")
    for given in ("kernels-community/flash-attn2", "someone/attention@v1:forward"):
        with pytest.raises(ConfigError, match="`kernels` is not installed"):
            drafted(skeleton("llama"), Backend(given))


@pytest.mark.parametrize("given", ["flash", "sdp", "", "paged|eager", "a/b/c"])
def test_other_names_are_refused_with_what_is_there(given: str) -> None:
    with pytest.raises(ConfigError, match="there is no such backend") as caught:
        drafted(skeleton("llama"), Backend(given))
    assert caught.value.valid == "eager, flex_attention, sdpa, fast"


@pytest.mark.parametrize("tolerance", [0.0, -1.0])
def test_a_tolerance_is_positive(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0") as caught:
        drafted(skeleton("llama"), Backend("sdpa", tolerance=tolerance))
    assert caught.value.key == "attention.backend.tolerance"
    assert caught.value.valid == "a number above 0, or null to go by the dtype"


@pytest.mark.parametrize("name", sorted(OWN_ATTENTION - {"falcon_alibi"}))
def test_attention_of_its_own_is_left_as_it_is(name: str) -> None:
    model = base_model(name, None)
    running = model.config._attn_implementation
    draft = drafted(model, Backend("fast"))
    assert draft.steps[0].arguments["implementation"] == running
    assert drafted(model, Backend(running)).steps
    with pytest.raises(ConfigError, match="brings attention code of its own") as caught:
        drafted(model, Backend("flex_attention"))
    assert caught.value.valid == f"{running}, fast"


@pytest.mark.parametrize("name", NAMES)
def test_exactly_what_goes_through_the_interface_can_be_switched(name: str) -> None:
    """transformers reads it off the source; here it is counted."""
    model = base_model(name)
    with _counting("eager", wider=False) as calls:
        run(model)
    assert bool(calls) == (name not in OWN_ATTENTION)
    claimed = "own" not in find_obstacle("flex_attention", Need(model, "cpu")).split()
    assert claimed == bool(calls)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_whatever_is_said_to_be_there_can_be_set(name: str) -> None:
    model = skeleton(name)
    for implementation in list_available(Need(model, "cpu")):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation


def test_newer_flash_and_flex_have_no_dropout() -> None:
    draft = drafted(skeleton("llama"), AttentionDropout(p=0.1), Backend("fast"))
    assert draft.steps[-1].arguments["implementation"] == "sdpa"
    with pytest.raises(ConfigError, match=r"has no dropout, and attention drops 0\.1"):
        drafted(skeleton("llama"), AttentionDropout(p=0.1), Backend("flex_attention"))


def test_flex_on_a_cpu_comes_with_a_caution() -> None:
    draft = drafted(skeleton("llama"), Backend("flex_attention"))
    assert draft.notes == ["flex_attention has no backward pass on cpu: it cannot train there"]


def test_heads_after_the_operations_count() -> None:
    need = Need(skeleton("llama"), "cuda", head_dims=(8,))
    assert "takes heads of 16 or wider, not 8" in find_obstacle("flex_attention", need)


def test_a_class_that_names_its_kernels_gets_no_other() -> None:
    model = skeleton("gpt_oss", torch.bfloat16)
    reason = find_obstacle("flash_attention_2", Need(model, "cuda"))
    assert "runs with" in reason
    assert "sdpa" not in list_available(Need(model, "cpu"))


def test_it_is_declared_like_any_operation() -> None:
    (parsed,) = parse_operations({"backend": {"implementation": "fast"}})
    assert parsed.to_json() == {
        "operation": "backend",
        "implementation": "fast",
        "check": True,
        "tolerance": None,
    }


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_fast_on_a_gpu_is_something_that_runs() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=61,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
    draft = drafted(model, Backend("fast"), device="cuda")
    chosen = draft.steps[0].arguments["implementation"]
    model.set_attn_implementation(chosen)
    logits = model(input_ids=torch.randint(3, 61, (2, 16), device="cuda")).logits
    assert torch.isfinite(logits).all()
    assert find_sites(model).sites
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        assert chosen.startswith("flash_attention")
