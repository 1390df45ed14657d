"""Sets of output projections: switching is exact, files are small, a wrong base is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.errors import SurgeryError
from surgery.lab.tasks import OutputProjections
from tests.tiny_models import tiny_model, tokens

MODELS = ("llama", "gpt2", "bert", "qwen3")
OUTPUTS = {"llama": "o_proj.", "qwen3": "o_proj.", "gpt2": "attn.c_proj.", "bert": "output.dense."}


def base_of(name: str, **fields: Any) -> Any:
    return tiny_model(name, **fields).eval()


def trained(base: Any, seed: int) -> Any:
    """A copy whose output projections, and nothing else, moved."""
    copy = deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    names = OutputProjections(copy)._names
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name in names:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return copy


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(2, 9)).logits


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, Any], Path]:
    base = base_of(request.param)
    copies = {"code": trained(base, 1), "prose": trained(base, 2)}
    projections = OutputProjections(base)
    for name, model in copies.items():
        projections.save(tmp_path / f"{name}.safetensors", model, "tiny")
    return base, copies, tmp_path


def test_each_set_is_its_model_and_none_the_base(case: tuple[Any, Any, Path]) -> None:
    base, copies, folder = case
    fresh = deepcopy(base)
    projections = OutputProjections(fresh)
    for name in copies:
        projections.add(name, folder / f"{name}.safetensors")
    assert projections.names == ["code", "prose"]
    assert torch.equal(logits(fresh), logits(base))  # added, and not used
    for name in ("prose", "code", None, "code", "code", "prose", None):
        projections.use(name)
        assert projections.used == name
        assert torch.equal(logits(fresh), logits(copies.get(name, base)))
    for (name, mine), (_, own) in zip(
        fresh.named_parameters(), base.named_parameters(), strict=True
    ):
        assert torch.equal(mine, own), name


def test_a_file_holds_nothing_else(case: tuple[Any, Any, Path]) -> None:
    base, copies, folder = case
    tensors = load_file(folder / "code.safetensors")
    kind = OUTPUTS[base.config.model_type]
    wanted = {
        n: p
        for n, p in copies["code"].named_parameters()
        if kind in n and ("attn" in n or "attention" in n)
    }
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)
    assert not list(folder.glob("*.partial"))
    with safe_open(folder / "code.safetensors", "pt") as file:
        assert file.metadata()["model"] == "tiny"


def test_a_cast_model_keeps_what_it_has(tmp_path: Path) -> None:
    base = base_of("llama")
    copy = trained(base, 1)
    projections = OutputProjections(base)
    projections.save(tmp_path / "a.safetensors", copy)
    projections.add("a", tmp_path / "a.safetensors")
    before = logits(base)
    projections.use("a")
    base.to(torch.float64)
    assert torch.equal(logits(base), logits(copy.to(torch.float64)))
    projections.use(None)
    assert base.model.layers[0].self_attn.o_proj.weight.dtype == torch.float64
    assert (logits(base) - before).abs().max() < 1e-4


def test_what_is_trained_under_a_name_stays_under_it(tmp_path: Path) -> None:
    base = base_of("llama")
    projections = OutputProjections(base)
    before = logits(base)
    projections.save(tmp_path / "a.safetensors", base)
    projections.add("a", tmp_path / "a.safetensors")
    projections.use("a")
    weight = base.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight += 1.0
    changed = logits(base)
    assert not torch.equal(changed, before)
    projections.use(None)
    assert torch.equal(logits(base), before)
    projections.use("a")
    assert torch.equal(logits(base), changed)


@pytest.mark.parametrize(
    "other",
    [
        lambda base: base_of("llama", seed=1),
        lambda base: base_of("llama", num_hidden_layers=1),
        lambda base: base_of("llama", num_attention_heads=2, num_key_value_heads=2),
        lambda base: base_of("qwen3"),
        lambda base: deepcopy(base).to(torch.bfloat16),
        lambda base: trained(base, 3),
    ],
    ids=["seed", "depth", "heads", "architecture", "dtype", "other outputs"],
)
def test_another_base_is_refused(other: Any, tmp_path: Path) -> None:
    base = base_of("llama")
    OutputProjections(base).save(tmp_path / "a.safetensors", trained(base, 1), "the base")
    projections = OutputProjections(other(base))
    with pytest.raises(SurgeryError, match=r"another base.*the base"):
        projections.add("a", tmp_path / "a.safetensors")
    assert projections.names == []


def test_more_than_output_projections_is_refused(tmp_path: Path) -> None:
    base = base_of("llama")
    copy = trained(base, 1)
    with torch.no_grad():
        copy.model.norm.weight[0] += 1
    projections = OutputProjections(base)
    with pytest.raises(SurgeryError, match="more than the output projections"):
        projections.save(tmp_path / "a.safetensors", copy)
    with pytest.raises(SurgeryError, match="another model"):
        projections.save(tmp_path / "a.safetensors", base_of("gpt2"))
    assert not list(tmp_path.iterdir())


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    base = base_of("llama")
    projections = OutputProjections(base)
    with pytest.raises(SurgeryError, match="there is no file"):
        projections.add("a", tmp_path / "a.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(SurgeryError, match="not a safetensors file"):
        projections.add("a", tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SurgeryError, match="has no output projections"):
        projections.add("a", tmp_path / "x.safetensors")
    projections.save(tmp_path / "a.safetensors", base)
    projections.add("a", tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError, match="already a set of output projections named 'a'"):
        projections.add("a", tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError, match="no output projections named 'b': a"):
        projections.use("b")


def test_attention_that_is_not_understood_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = AutoConfig.for_model("diffllama", vocab_size=8, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SurgeryError, match=r"cannot be read.*differential attention"):
        OutputProjections(model)
