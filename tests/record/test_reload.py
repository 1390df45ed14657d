"""Records read back where only `import surgery` was said: by transformers, in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.coverage import zoo
from surgery.errors import PlanError, SurgeryError
from surgery.execute.live import apply_
from surgery.models.own_record import is_own_record
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.record.exporting import CASES, TEXT, TOKENS, exported, original
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
IDS = torch.arange(8, 26).view(2, TOKENS)
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}

# Runs in a process of its own: [folder, auto class, options] … → logits, tokens, cache.
RELOAD = """
import sys, torch
FIRST
import transformers
jobs = torch.load(sys.argv[1], weights_only=False)
found = {}
with torch.no_grad():
    for name, (folder, auto, options, inputs, prompt, generate) in jobs.items():
        model = getattr(transformers, auto).from_pretrained(folder, **options).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        answer = {"logits": model(**inputs).logits, "dtype": model.dtype}
        if prompt is not None:
            mask = torch.ones_like(prompt)
            answer["tokens"] = model.generate(input_ids=prompt, attention_mask=mask, **generate)
            cache = model(input_ids=prompt, use_cache=True).past_key_values
            held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
            answer["bytes"] = sum(t.numel() * t.element_size() for t in held)
        found[name] = answer
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and there: how sums are split shows in their last bits
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Case → what the model in memory says, and what the one that was read back says."""
    root = tmp_path_factory.mktemp("records")
    jobs, here = {}, {}
    for name, (kind, _, options, _) in CASES.items():
        model, plan = exported(name)
        model.save_pretrained(root / name)
        inputs = zoo.inputs(kind, model)
        prompt = IDS if kind == "causal-lm" else None
        asked = {"attn_implementation": options.get("attention", "eager")}
        jobs[name] = (str(root / name), AUTO[kind], asked, inputs, prompt, GENERATE)
        with torch.no_grad():
            here[name] = {"logits": model(**inputs).logits, "plan": plan}
            if prompt is not None:
                mask = torch.ones_like(prompt)
                here[name]["tokens"] = model.generate(
                    input_ids=prompt, attention_mask=mask, **GENERATE
                )
    torch.save(jobs, root / "jobs.pt")
    done = python(RELOAD.replace("FIRST", "import surgery"), str(root / "jobs.pt"))
    assert done.returncode == 0, done.stderr
    there = torch.load(root / "jobs.pt", weights_only=False)
    return {name: (here[name], there[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same_to_the_bit(name: str, elsewhere: dict[str, Any]) -> None:
    here, there = elsewhere[name]
    assert torch.equal(here["logits"], there["logits"])


@pytest.mark.parametrize("name", TEXT)
def test_it_generates_the_same_with_a_cache_of_the_planned_size(
    name: str, elsewhere: dict[str, Any]
) -> None:
    here, there = elsewhere[name]
    assert torch.equal(here["tokens"], there["tokens"])
    plan = here["plan"]
    assert (plan.tokens, plan.kv_bytes) == (IDS.shape[1], torch.float32.itemsize)
    assert there["bytes"] == IDS.shape[0] * plan.sizes_after.kv_bytes


def test_without_us_transformers_fails_or_says_so(tmp_path: Path) -> None:
    """Never silently wrong: it knows no such method, and then no such shapes."""
    names = ["llama-gqa", "llama-prune", "gpt2-gqa", "llama-removed"]
    for name in names:
        saved(name, tmp_path / name)
    program = """
import json, sys, transformers
found = {}
for folder in sys.argv[1:]:
    print("BEGIN", file=sys.stderr, flush=True)
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        found[folder] = ""
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
assert "surgery" not in sys.modules
print(json.dumps(found))
"""
    done = python(program, *(str(tmp_path / name) for name in names))
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    warnings = done.stderr.split("BEGIN")[1:]
    for name, warned in zip(names, warnings, strict=True):
        assert "attention_surgery" in warned, name
        if name != "llama-removed":  # all that it lacks would be drawn anew
            assert "mismatched_sizes" in errors[str(tmp_path / name)], (name, errors)
        else:
            assert errors[str(tmp_path / name)] or "newly initialized" in warned


def saved(name: str, folder: Path, **options: Any) -> Any:
    model, _ = exported(name)
    model.save_pretrained(folder, **options)
    return model


def loaded(folder: Path, **options: Any) -> Any:
    options = {"attn_implementation": "eager"} | options
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-gqa", "llama-removed"])
def test_another_dtype_is_the_model_in_that_dtype(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    found = loaded(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    for parameter in model.parameters():  # and no buffer: rotations are made anew in fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(said(found), said(model))


@pytest.mark.parametrize("where", ["cpu", "auto"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-gqa", "llama-removed"])
def test_a_device_map(name: str, where: str, tmp_path: Path) -> None:
    if find_spec("accelerate") is None:
        pytest.skip("a device map needs accelerate, which is not installed")
    model = saved(name, tmp_path)
    assert torch.equal(said(loaded(tmp_path, device_map=where)), said(model))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-prune", "llama-tied", "llama-removed"])
def test_in_several_files(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(said(loaded(tmp_path)), said(model))


@pytest.mark.parametrize("name", TEXT)
def test_saved_again_it_is_the_same_again(name: str, tmp_path: Path) -> None:
    asked = CASES[name][2].get("attention", "eager")
    model = saved(name, tmp_path / "one")
    first = loaded(tmp_path / "one", attn_implementation=asked)
    first.save_pretrained(tmp_path / "two")
    second = loaded(tmp_path / "two", attn_implementation=asked)
    assert torch.equal(said(second), said(model))
    assert find_sites(second) == find_sites(model)
    records = [
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("one", "two")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-gqa", "llama-removed"])
def test_it_can_be_trained_on(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    model = loaded(tmp_path).train()
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for n, p in model.named_parameters() if "self_attn" in n)


PRUNE = {"prune_heads": {"heads": {0: [2, 3], 1: [0]}}}
GQA = {"gqa": {"kv_heads": [1, 3]}}


@pytest.mark.parametrize(
    ("model_type", "first", "second"),
    [
        ("llama", {"gqa": {"kv_heads": [2, 4]}}, PRUNE),
        ("llama", {"prune_heads": {"heads": {0: [2], 1: [0]}}}, GQA),
        ("llama", {"gqa": {"kv_heads": [2, 1]}}, {"gqa": {"kv_heads": 1}}),
        (
            "llama",
            {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}},
            {"gqa": {"kv_heads": 2, "layers": [0]}},
        ),
        ("gpt2", {"gqa": {"kv_heads": [2, 4]}}, PRUNE),
        ("gpt2", {"prune_heads": {"heads": {0: [2], 1: [0]}}}, GQA),
        ("opt", {"prune_heads": {"heads": {0: [2]}}}, {"prune_heads": {"heads": {1: [1]}}}),
    ],
)
def test_a_second_surgery_on_what_was_read_back_is_both_at_once(
    model_type: str, first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    name = next(case for case in CASES if case.startswith(model_type))
    model, both = original(name), original(name)
    apply_(model, make_plan(model, parse_operations(first)))
    model.save_pretrained(tmp_path / "one")
    again = loaded(tmp_path / "one")
    apply_(again, make_plan(again, parse_operations(second)))
    if list(first) != list(second) and "remove_attention" not in str(first):
        apply_(both, make_plan(both, parse_operations(first | second)))
    else:
        for attention in (first, second):
            apply_(both, make_plan(both, parse_operations(attention)))
    state = both.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    assert torch.equal(said(again), said(both))
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(said(loaded(tmp_path / "two")), said(both))


def test_a_record_that_says_nothing_any_more_is_gone(tmp_path: Path) -> None:
    model = original("llama-gqa")
    apply_(model, make_plan(model, parse_operations({"gqa": {"kv_heads": [2, 4]}})))
    model.save_pretrained(tmp_path / "one")
    again = loaded(tmp_path / "one")
    assert is_own_record(again.config.quantization_config)
    plan = make_plan(again, parse_operations({"gqa": {"kv_heads": 2}}))
    assert plan.export.format == "native"
    apply_(again, plan)
    again.save_pretrained(tmp_path / "two")
    assert "quantization_config" not in json.loads((tmp_path / "two/config.json").read_text())
    assert torch.equal(said(loaded(tmp_path / "two")), said(again))


def with_record(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("found", [0, 3, "1"])
def test_another_format_is_refused(found: Any, tmp_path: Path) -> None:
    saved("llama-gqa", tmp_path)
    with_record(tmp_path, format=found)
    with pytest.raises(PlanError, match=f"a record of format {found}; this version reads 1"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensors": {"model.layers.0.self_attn.z_proj.weight": [8, 32]}}, "self_attn.z_proj"),
        ({"tensors": {"model.layers.7.self_attn.k_proj.weight": [8, 32]}}, "layers.7.self_attn"),
        ({"tensors": {"model.layers.0.self_attn.k_proj.wait": [8, 32]}}, "k_proj.wait"),
        ({"attributes": {"model.layers.7": {"x": 1}}}, "model.layers.7"),
        ({"steps": [["melt", {}]]}, "'melt'"),
        ({"steps": [["remove_attention", {"sites": ["nowhere"]}]]}, "nowhere"),
        ({"steps": [["remove_attention", {"places": []}]]}, "remove_attention"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    saved("llama-gqa", tmp_path)
    with_record(tmp_path, **changes)
    with pytest.raises(SurgeryError) as caught:
        loaded(tmp_path)
    assert named in str(caught.value)


def test_heads_merged_before_their_attention_went(tmp_path: Path) -> None:
    model = tiny_model("llama")
    operations = {
        "gqa": {"kv_heads": 1},
        "prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True},
    }
    model = apply_(model, make_plan(model, parse_operations(operations)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
