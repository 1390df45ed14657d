"""Models that can be had: embedded, from a directory, from scratch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification

from surgery.config.schema import Dtype, Task
from surgery.models.source import ByT5Tokenizer, find_embedded_dir
from tests.families import family, family_config, logits
from tests.models.sources import source

SCRATCH = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def test_a_directory_gives_back_the_model_that_was_saved(saved: Path) -> None:
    model = source(saved).load()
    assert torch.equal(logits(model), logits(family("llama", dtype=torch.float32)))
    assert not model.training
    assert source(saved).name == str(saved)


def test_a_path_may_begin_at_home(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert source(f"~/{saved.name}").locate() == str(saved)


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16, Dtype.float32])
def test_weights_have_the_dtype_asked_for(saved: Path, dtype: Dtype) -> None:
    for found in (
        source(saved, dtype=dtype),
        source(scratch=SCRATCH, tokenizer="bytes", dtype=dtype),
    ):
        model = found.load()
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype.value)}
        # Rounded, RoPE's frequencies would turn far positions by whole turns.
        exact = source(saved).load().model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
def test_the_attention_asked_for_is_used(saved: Path, implementation: str | None) -> None:
    options = {"attn_implementation": implementation, "tokenizer": "bytes"}
    for found in (source(saved, **options), source(scratch=SCRATCH, **options)):
        assert found.load().config._attn_implementation == (implementation or "sdpa")


def test_a_skeleton_has_the_models_shapes_and_no_weights(saved: Path) -> None:
    shell, model = source(saved).build_meta_model(), source(saved).load()
    assert all(p.is_meta for p in shell.parameters())
    assert {k: t.shape for k, t in shell.state_dict().items()} == {
        k: t.shape for k, t in model.state_dict().items()
    }


def test_a_classifiers_head_is_made_and_its_body_is_loaded(saved: Path) -> None:
    found = source(saved, task=Task.sequence_classification, num_labels=5)
    classifier, original = found.load(), source(saved).load()
    assert classifier.score.weight.shape == (5, 64)
    assert torch.equal(classifier.model.norm.weight, original.model.norm.weight)


def test_a_classifier_that_was_trained_keeps_its_head(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(family_config("llama", num_labels=3))
    model.save_pretrained(tmp_path)
    loaded = source(tmp_path, task=Task.sequence_classification).load()
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_random_weights_fit_the_tokenizer() -> None:
    found = source(scratch=SCRATCH, tokenizer="bytes")
    model = found.load()
    assert model.get_input_embeddings().weight.shape == (len(found.load_tokenizer()), 64)
    assert model.config.pad_token_id == found.load_tokenizer().pad_token_id
    assert found.name == "llama (random weights)"
    found.check_weights()  # there are none to look for


def test_aliases_of_a_config_are_keys_too() -> None:
    fields = {"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 1, "n_head": 4}
    config = source(scratch=fields, tokenizer="bytes").load_config()
    assert (config.n_embd, config.n_layer, config.n_head) == (64, 1, 4)


@pytest.mark.parametrize("name", ["bytes", None])
def test_a_byte_is_a_token(saved: Path, name: str | None) -> None:
    tokenizer = source(saved, tokenizer=name).load_tokenizer()
    assert isinstance(tokenizer, ByT5Tokenizer)
    assert tokenizer("aé", add_special_tokens=False)["input_ids"] == [100, 198, 172]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 259)


def test_a_tokenizer_may_stand_elsewhere(saved: Path) -> None:
    found = source(scratch=SCRATCH, tokenizer=str(saved))
    assert len(found.load_tokenizer()) == 259


def test_the_embedded_model_is_whole() -> None:
    found = source("embedded")
    assert found.locate() == str(find_embedded_dir())
    model, tokenizer = found.load(), found.load_tokenizer()
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.num_key_value_heads == model.config.num_attention_heads


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_on_the_disk_is_not_asked_of_the_network(
    saved: Path, network: list[str], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for path in (saved, "embedded"):
        found = source(path)
        found.load_config(), found.build_meta_model(), found.load(), found.load_tokenizer()
    assert network == []


def test_the_watch_on_the_network_sees_an_attempt(network: list[str]) -> None:
    socket.getaddrinfo("localhost", 80)
    assert network == ["socket.getaddrinfo"]
