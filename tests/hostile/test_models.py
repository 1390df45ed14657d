"""Model directories of others: their config.json, their weights and what an index names."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import CONFIG_MAPPING

from surgery.config.schema import Task
from surgery.errors import ConfigError
from surgery.models import limits
from surgery.models.limits import TooManyModulesError, check_fields, limiting_modules
from surgery.models.source import ModelSource, build_model
from tests.hostile.bases import CONFIG, INDEX, WEIGHTS, Bases
from tests.models.sources import source
from tests.tiny_models import tiny_model


@pytest.fixture
def copy(bases: Bases, tmp_path: Path) -> Callable[..., ModelSource]:
    """A copy of a model directory whose config has other fields."""

    def make(family: str = "llama", **fields: Any) -> ModelSource:
        folder = tmp_path / "model"
        shutil.copytree(bases.models[family], folder)
        config = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps(config))
        return source(folder, task=Task.masked_lm if family == "bert" else Task.causal_lm)

    return make


def refuse(action: Callable[[], object], key: str = "model.path") -> ConfigError:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        action()
    assert caught.value.key == key
    assert time.monotonic() - start < 20
    return caught.value


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and must be at"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000, and must be at most 10000"),
        ("llama", {"num_labels": 10**9}, "num_labels is 1000000000, and must be at most 100000"),
        ("llama", {"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
        ("llama", {"head_dim": 10**12}, "head_dim is 1000000000000"),
        ("llama", {"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000"),
        ("llama", {"attention_dropout": 2}, "attention_dropout is 2, and must be in [0, 1]"),
        ("llama", {"attention_dropout": math.nan}, "attention_dropout is nan, and must be in"),
        ("llama", {"attention_dropout": -0.1}, "attention_dropout is -0.1, and must be in"),
        ("gpt2", {"attn_pdrop": "0.1"}, "attn_pdrop is '0.1', and must be a number in [0, 1]"),
        ("bert", {"hidden_dropout_prob": 7}, "hidden_dropout_prob is 7, and must be in"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan, and must be a number"),
        ("llama", {"nested": {"num_layers": 10**9}}, "nested.num_layers is 1000000000"),
        ("llama", {"model_type": 5}, "model_type is 5"),
        ("llama", {"quantization_config": "attention_surgery"}, "quantization_config is 'atten"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"hidden_size": [32]}, "hidden_size"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_fields_that_no_config_has(
    copy: Callable[..., ModelSource], family: str, fields: dict[str, Any], said: str
) -> None:
    found = copy(family, **fields)
    assert said in refuse(found.build_meta_model).problem
    assert refuse(found.load).given == found.spec.path


@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING)[::20])
def test_what_architectures_say_of_themselves_is_accepted(model_type: str) -> None:
    fields = CONFIG_MAPPING[model_type]().to_dict()
    check_fields(json.loads(json.dumps(fields, default=str)), "model.path", model_type)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ("llama", {"intermediate_size": 0}, "intermediate_size=0"),
        ("llama", {"num_attention_heads": 0}, ""),
        ("llama", {"hidden_size": -32}, "hidden_size=-32"),
        ("gpt2", {"n_embd": 0}, "n_embd=0"),
        ("gpt2", {"vocab_size": 0}, "vocab_size=0"),
        ("bert", {"num_attention_heads": 0}, ""),
    ],
)
def test_sizes_of_nothing(
    copy: Callable[..., ModelSource], family: str, fields: dict[str, Any], named: str
) -> None:
    assert named in refuse(copy(family, **fields).build_meta_model).problem


def test_a_scratch_config_is_checked_too() -> None:
    scratch = {"model_type": "llama", "vocab_size": 64, "attention_dropout": 2}
    error = refuse(source(scratch=scratch).build_meta_model, "model.scratch")
    assert "attention_dropout is 2" in error.problem


def test_a_model_larger_than_the_memory(
    copy: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be planned on, but not loaded; the bytes are those of its tensors."""
    found = copy()
    model = tiny_model("llama")
    needed = sum(t.numel() * 4 for t in [*model.parameters(), *model.buffers()])
    monkeypatch.setattr(limits, "find_memory", lambda: needed - 1)
    found.build_meta_model()
    assert "this machine has" in refuse(found.check_weights).problem
    monkeypatch.setattr(limits, "find_memory", lambda: needed)
    found.check_weights()


def test_the_machines_memory_is_known() -> None:
    memory = limits.find_memory()
    assert memory is not None
    assert memory > 1 << 30


def test_modules_are_counted_as_they_are_built() -> None:
    def build(count: int) -> nn.Module:
        return nn.ModuleList([nn.Linear(1, 1, device="meta") for _ in range(count)])

    with limiting_modules(10):
        build(10)
    with pytest.raises(TooManyModulesError), limiting_modules(10):
        build(11)
    build(11)  # no longer counted


def test_a_config_of_too_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("llama").config
    monkeypatch.setattr("surgery.models.source.limiting_modules", lambda: limiting_modules(5))
    with torch.device("meta"), pytest.raises(ConfigError, match="more than 5 modules"):
        build_model(config, Task.causal_lm)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def sharded(bases: Bases, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    shutil.copytree(bases.sharded, folder)
    (folder / "evil.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    (folder / "evil.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    return folder


def test_two_shards_are_one_model(sharded: Path, bases: Bases) -> None:
    state = source(sharded).load().state_dict()
    whole = source(bases.models["llama"]).load().state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("evil.bin", "names 'evil.bin', which is not a safetensors file of the directory"),
        ("evil.safetensors", "evil.safetensors is not a safetensors file"),
        ("decoy.safetensors", "decoy.safetensors is not a safetensors file"),
        ("missing.safetensors", "there is no 'missing.safetensors'"),
        ("x" * 5000 + ".safetensors", "there is no 'xxx"),
        ("/etc/passwd", "names '/etc/passwd', which is not"),
        ("../sharded/model-00001-of-00002.safetensors", "names '../sharded"),
        ("sub/x.safetensors", "names 'sub/x.safetensors', which is not"),
        ("..", "names '..', which is not"),
        ("", "names '', which is not"),
        (5, "names 5, which is not"),
        (None, "names None, which is not"),
        (["a.safetensors"], "names ['a.safetensors'], which is not"),
    ],
)
def test_an_index_names_only_safetensors_of_its_directory(
    sharded: Path, tmp_path: Path, named: Any, said: str
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = named
    (sharded / INDEX).write_text(json.dumps(index))
    assert said in refuse(source(sharded).check_weights).problem
    refuse(source(sharded).load)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "5", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 10**5, "\udcff"]
)
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert INDEX in refuse(source(sharded).load).problem


def test_an_index_beside_a_whole_file_is_not_read(sharded: Path, bases: Bases) -> None:
    """As transformers does it: the whole file is what is loaded."""
    shutil.copy(bases.models["llama"] / WEIGHTS, sharded / WEIGHTS)
    (sharded / INDEX).write_text('{"weight_map": {"x": "evil.bin"}}')
    source(sharded).load()


def test_an_index_of_the_hub(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names is refused before anything of it is opened, as from a directory."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "evil.bin"
    (sharded / INDEX).write_text(json.dumps(index))
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    shutil.copytree(sharded, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refuse(source("owner/name").load)
    assert "names 'evil.bin'" in error.problem
    assert not (tmp_path / "ran").exists()


def test_a_config_names_other_weights(copy: Callable[..., ModelSource]) -> None:
    found = copy(transformers_weights="../x.safetensors")
    assert "config.json names '../x.safetensors'" in refuse(found.load).problem


def test_an_adapter_would_bring_its_base(copy: Callable[..., ModelSource]) -> None:
    found = copy()
    (Path(str(found.spec.path)) / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refuse(found.load).problem


def test_other_safetensors_are_no_weights(copy: Callable[..., ModelSource]) -> None:
    found = copy()
    folder = Path(str(found.spec.path))
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert "has other.safetensors, but no model.safetensors" in refuse(found.load).problem


def test_a_tokenizer_of_garbage(copy: Callable[..., ModelSource]) -> None:
    found = copy()
    folder = Path(str(found.spec.path))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    refuse(found.load_tokenizer, "model.tokenizer")


@pytest.mark.parametrize("path", ["~nobody-here/x", "x\0y", "/" + "x" * 5000, "\ud800/a/b"])
def test_paths_that_no_file_has(path: str) -> None:
    refuse(source(path).load_config)
