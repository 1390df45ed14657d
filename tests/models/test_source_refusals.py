"""Models that cannot be had: one error, with the key, what was given, and what is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from surgery.config.schema import Task
from surgery.errors import ConfigError
from surgery.models.source import ModelSource
from tests.families import family
from tests.models.sources import Edit, edited, source, with_config

WEIGHTS = "model.safetensors"


def refused(action: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        action()
    return caught.value


def without_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def other_name(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "weights.pt")
    without_weights(directory)


def cut_short(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def not_safetensors(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"hello")


def without_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def broken_json(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama",')


class TestPath:
    @pytest.mark.parametrize("path", ["/no/such/model", "./nowhere", "~/nowhere", "a/b/c"])
    def test_no_such_directory(self, path: str) -> None:
        error = refused(source(path).locate)
        assert (error.key, error.given) == ("model.path", path)
        assert "no such directory" in error.problem
        assert error.valid == (
            "embedded, smollm2, minilm, an existing directory or .gguf file, or a hub id owner/name"
        )

    def test_an_old_hub_id_has_no_owner(self) -> None:
        assert source("gpt2").locate() == "gpt2"

    def test_a_file(self, saved: Path) -> None:
        error = refused(source(saved / "config.json").locate)
        assert error.key == "model.path"
        assert "is a file" in error.problem

    def test_nothing_named(self) -> None:
        error = refused(source().load_config)
        assert error.key == "model.path"
        assert "no model is named" in error.problem

    @pytest.mark.parametrize("what", ["load_config", "load", "load_tokenizer"])
    def test_a_hub_id_while_offline(
        self, what: str, monkeypatch: pytest.MonkeyPatch, network: list[str]
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        start = time.perf_counter()
        error = refused(getattr(source("surgery-tests/there-is-no-such-model"), what))
        assert time.perf_counter() - start < 5
        assert error.key == ("model.tokenizer" if what == "load_tokenizer" else "model.path")
        assert error.given == "surgery-tests/there-is-no-such-model"
        assert "couldn't connect" in error.problem
        assert network == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (broken_json, "config.json cannot be read: "),
        (lambda d: (d / "config.json").write_text("[1]"), "config.json is not an object"),
        (with_config(model_type=...), "Unrecognized model"),
        (with_config(model_type="lama"), "model type `lama`"),
        (with_config(hidden_size="wide"), "'hidden_size' expected int"),
        (with_config(num_attention_heads=7), "not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_cannot_be(saved: Path, tmp_path: Path, edit: Edit, said: str) -> None:
    found = source(edited(saved, tmp_path / "model", edit))
    for action in (found.load_config, found.build_meta_model, found.load):
        error = refused(action)
        assert (error.key, error.given) == ("model.path", found.spec.path)
        assert said in error.problem


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without_weights, "has no weights"),
        (other_name, "has weights.pt, but no model.safetensors, "),
    ],
)
def test_weights_that_are_not_there_are_missed_before_loading(
    saved: Path, tmp_path: Path, edit: Edit, said: str
) -> None:
    found = source(edited(saved, tmp_path / "model", edit))
    for action in (found.check_weights, found.load):
        error = refused(action)
        assert (error.key, error.problem) == ("model.path", refused(found.load).problem)
        assert said in error.problem


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (cut_short, "cannot be loaded"),
        (not_safetensors, "cannot be loaded"),
        (without_a_tensor, "model.layers.1.self_attn.k_proj.weight is missing"),
        (with_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
        (with_config(num_hidden_layers=1), "there is no model.layers.1.input_layernorm.weight"),
        (with_config(num_key_value_heads=2), "k_proj.weight is [64, 64], but should be [16, 64]"),
        (with_config(attention_bias=True), "k_proj.bias is missing"),
        (with_config(model_type="qwen3", head_dim=8), "self_attn.k_norm.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_are_never_made_up(
    saved: Path, tmp_path: Path, edit: Edit, said: str
) -> None:
    error = refused(source(edited(saved, tmp_path / "model", edit)).load)
    assert error.key == "model.path"
    assert said in error.problem


def test_a_body_without_its_head(tmp_path: Path) -> None:
    family("llama").model.save_pretrained(tmp_path)
    assert "lm_head.weight is missing" in refused(source(tmp_path).load).problem


class TestTask:
    @pytest.mark.parametrize("action", ["build_meta_model", "load"])
    def test_no_class_for_it(self, saved: Path, action: str) -> None:
        error = refused(getattr(source(saved, task=Task.masked_lm), action))
        assert (error.key, error.given) == ("model.task", "masked_lm")
        assert error.valid == "causal_lm, sequence_classification"

    @pytest.mark.parametrize("action", ["check_weights", "load"])
    @pytest.mark.parametrize("implementation", ["flashy", "flash_attention_2"])
    def test_no_such_attention(self, saved: Path, action: str, implementation: str) -> None:
        error = refused(getattr(source(saved, attn_implementation=implementation), action))
        assert (error.key, error.given) == ("model.attn_implementation", implementation)


class TestScratch:
    def scratch(self, **fields: Any) -> ModelSource:
        return source(scratch=fields, tokenizer="bytes")

    def test_an_unknown_model_type(self) -> None:
        error = refused(self.scratch(model_type="lama").load_config)
        assert (error.key, error.given) == ("model.scratch.model_type", "lama")
        assert "llama" in error.valid

    def test_no_model_type(self) -> None:
        error = refused(self.scratch(hidden_size=64).load_config)
        assert error.key == "model.scratch.model_type"
        assert "required" in error.problem

    def test_a_misspelt_key(self) -> None:
        error = refused(self.scratch(model_type="llama", hiden_size=64).load_config)
        assert error.key == "model.scratch.hiden_size"
        assert "hidden_size" in error.valid

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"hidden_size": "wide"}, "expected int"),
            ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ],
    )
    def test_values_that_cannot_be(self, fields: dict[str, Any], said: str) -> None:
        error = refused(self.scratch(model_type="llama", **fields).load_config)
        assert error.key == "model.scratch"
        assert said in error.problem

    def test_values_that_only_building_finds(self) -> None:
        fields = {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}
        error = refused(self.scratch(model_type="llama", **fields).build_meta_model)
        assert error.key == "model.scratch"
        assert "no llama can be built from this config" in error.problem


class TestTokenizer:
    def test_none_beside_the_model(self, tmp_path: Path) -> None:
        family("llama").save_pretrained(tmp_path)
        error = refused(source(tmp_path).load_tokenizer)
        assert (error.key, error.given) == ("model.tokenizer", str(tmp_path))
        assert error.problem == "the directory has no tokenizer"

    @pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "byte"])
    def test_none_where_it_is_said_to_be(self, saved: Path, name: str) -> None:
        error = refused(source(saved, tokenizer=name).load_tokenizer)
        assert (error.key, error.given) == ("model.tokenizer", name)
        assert "bytes" in error.valid

    def test_a_file_that_is_none(self, saved: Path, tmp_path: Path) -> None:
        family("llama").save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        error = refused(source(saved, tokenizer=str(tmp_path)).load_tokenizer)
        assert (error.key, error.given) == ("model.tokenizer", str(tmp_path))
        assert "cannot be loaded" in error.problem
