"""What the plan says of other runtimes: the data file is sound, and the reasons are the right ones.

The runtimes themselves are not installed here, so the facts are not checked against them.
"""

from __future__ import annotations

from datetime import date

import pytest
import transformers

from surgery.plan.runtimes import find_runtimes, read_runtimes

LLAMA = "LlamaForCausalLM"


def served(architecture: str, **kwargs: object) -> set[str]:
    found = find_runtimes(architecture, **{"native": True, **kwargs})  # type: ignore[arg-type]
    return {name for name, reason in found.items() if not reason}


def test_a_native_llama_is_served_by_all() -> None:
    found = find_runtimes(LLAMA, native=True, rope_types=["default"])
    assert found == {"transformers": "", "vllm": "", "llama.cpp": ""}
    assert served(LLAMA, explicit_head_dim=True) == set(found)


def test_a_record_is_served_by_transformers_only() -> None:
    found = find_runtimes(LLAMA, native=False)
    assert found["transformers"] == ""
    assert "import surgery" in found["vllm"]
    assert "import surgery" in found["llama.cpp"]


def test_an_unknown_class_is_named_with_version_and_date() -> None:
    found = find_runtimes("NobodyForCausalLM", native=True)
    assert served("NobodyForCausalLM") == {"transformers"}
    for name, facts in read_runtimes().items():
        assert "NobodyForCausalLM" in found[name]
        assert facts["version"] in found[name]
        assert facts["date"] in found[name]


def test_head_dim_matters_only_where_it_is_explicit() -> None:
    assert served("Qwen2ForCausalLM") == {"transformers", "vllm", "llama.cpp"}
    assert served("Qwen2ForCausalLM", explicit_head_dim=True) == {"transformers"}
    assert served("GraniteForCausalLM", explicit_head_dim=True) == {"transformers", "vllm"}
    assert served("Qwen3ForCausalLM", explicit_head_dim=True) == {
        "transformers",
        "vllm",
        "llama.cpp",
    }


def test_kv_heads_matter_only_where_they_are_grouped() -> None:
    assert served("PhiForCausalLM") == {"transformers", "vllm", "llama.cpp"}
    assert served("PhiForCausalLM", grouped=True) == {"transformers", "vllm"}


def test_rope_types_for_all_and_for_some() -> None:
    assert served(LLAMA, rope_types=["llama3"]) == {"transformers", "vllm", "llama.cpp"}
    assert served("Qwen3ForCausalLM", rope_types=["yarn"]) == {"transformers", "vllm", "llama.cpp"}
    assert served("Qwen3ForCausalLM", rope_types=["llama3"]) == {"transformers", "vllm"}
    assert served(LLAMA, rope_types=["default", "spiral"]) == {"transformers"}
    assert "spiral" in find_runtimes(LLAMA, native=True, rope_types=["spiral"])["vllm"]


def test_windows_are_told_to_those_that_read_them() -> None:
    everyone, rest = {"transformers", "vllm", "llama.cpp"}, {"transformers", "vllm"}
    assert served("MistralForCausalLM", windows_moved=True) == everyone  # its window is gone
    assert served("MistralForCausalLM", windowed=True) == rest
    assert served("Gemma2ForCausalLM", windowed=True) == everyone
    assert served("Gemma2ForCausalLM", windowed=True, windows_moved=True) == rest
    assert served("Olmo3ForCausalLM", windowed=True, windows_moved=True) == everyone


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_the_data_file_agrees_with_itself(name: str) -> None:
    facts = read_runtimes()[name]
    listed = facts["architectures"]
    assert date.fromisoformat(facts["date"]) <= date.today()
    ignores = facts["ignores_head_dim"], facts["ignores_kv_heads"]
    windows = facts.get("reads_windows", {}).values()
    for names in (listed, *ignores, *windows, *facts.get("rope_types_of", {}).values()):
        assert names == sorted(set(names))
        assert set(names) <= set(listed)
    assert not set(facts["rope_types"]) & set(facts.get("rope_types_of", {}))
    # A slip in the spelling would show: far most of the names are classes of transformers.
    assert sum(hasattr(transformers, each) for each in listed) > len(listed) / 2
