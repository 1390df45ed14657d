"""Heads that the weights do not have are refused by their headers, before any weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from surgery.config.schema import Task
from surgery.errors import ConfigError
from surgery.models.headers import find_header_misfit
from tests.models.sources import edited, source, with_config

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
WEIGHTS = "model.safetensors"
PRUNED = {"0": [1]}


def save(path: Path, kind: type[PreTrainedModel] = BertForMaskedLM, **options: Any) -> Path:
    kind(BertConfig(**CONFIG)).save_pretrained(path, **options)
    return path


def remove_head(path: Path) -> None:
    """As transformers 4 saved a model whose head 1 of layer 0 was pruned."""
    for file in path.glob("*.safetensors"):
        prune(file)
    with_config(pruned_heads=PRUNED)(path)


def prune(file: Path) -> None:
    weights = load_file(file)
    keep = torch.cat([torch.arange(0, 8), torch.arange(16, 32)])
    for name in weights:
        if "layer.0.attention.self" in name:
            weights[name] = weights[name][keep].contiguous()
        if "layer.0.attention.output.dense.weight" in name:
            weights[name] = weights[name][:, keep].contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def check(path: Path, task: Task = Task.masked_lm) -> None:
    found = source(path, task=task)
    found.check_shapes(found.build_meta_model())


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel, BertForSequenceClassification])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_pruned_heads_of_transformers_4(
    kind: type[PreTrainedModel], shard: str, tmp_path: Path
) -> None:
    """Saved with a head or without one, and read for another: the names differ by a prefix."""
    whole = save(tmp_path / "whole", kind, max_shard_size=shard)
    assert len(list(whole.glob("*.safetensors"))) > 1 or shard == "1GB"
    for task in (Task.masked_lm, Task.sequence_classification):
        check(whole, task)
    pruned = edited(whole, tmp_path / "pruned", remove_head)
    for task in (Task.masked_lm, Task.sequence_classification):
        with pytest.raises(
            ConfigError, match="pruned_heads, which transformers 5 does not read"
        ) as no:
            check(pruned, task)
        assert no.value.key == "model.path"
        assert no.value.given == "pruned_heads: {'0': [1]}"
        assert "bert.encoder.layer.0.attention." in no.value.problem
        assert "24" in no.value.problem
        assert "operations can remove the same ones" in str(no.value.valid)


def test_pruned_heads_that_are_all_there(tmp_path: Path) -> None:
    """Somebody put them back: the weights have what transformers 5 builds."""
    check(edited(save(tmp_path / "whole"), tmp_path / "m", with_config(pruned_heads=PRUNED)))


def test_other_weights_that_do_not_fit(tmp_path: Path) -> None:
    wider = with_config(hidden_size=64, intermediate_size=48)
    path = edited(save(tmp_path / "whole"), tmp_path / "m", wider)
    with pytest.raises(ConfigError, match="the weights do not fit the config") as no:
        check(path)
    assert no.value.given == str(path)
    assert "but should be [64" in no.value.problem


def test_the_weights_that_the_config_names(tmp_path: Path) -> None:
    """transformers does not open the usual ones then, so these may have other heads."""

    other = "other.safetensors"
    name_other = with_config(transformers_weights=other)

    def add_pruned(path: Path) -> None:
        shutil.copy(path / WEIGHTS, path / other)
        prune(path / WEIGHTS)
        name_other(path)

    def name_pruned(path: Path) -> None:
        (path / WEIGHTS).rename(path / other)
        prune(path / other)
        name_other(path)

    whole = save(tmp_path / "whole")
    check(edited(whole, tmp_path / "a", add_pruned))
    with pytest.raises(ConfigError, match="the weights do not fit the config"):
        check(edited(whole, tmp_path / "b", name_pruned))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"bert.encoder.layer.0.attention.self.query.weight": "../whole.bin"}}',
        '{"weight_map": {"bert.encoder.layer.0.attention.self.query.weight": 5}}',
        '{"weight_map": {"bert.encoder.layer.0.attention.self.query.weight": "no.safetensors"}}',
    ],
)
def test_what_cannot_be_read_is_left_to_the_loader(index: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / WEIGHTS).rename(path / "elsewhere.safetensors")
    (path / "model.safetensors.index.json").write_text(index)
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**(CONFIG | {"hidden_size": 64})))
    assert find_header_misfit(path, model) is None
    (path / WEIGHTS).write_bytes(b"hello")
    assert find_header_misfit(path, model) is None


def test_quantized_weights_have_shapes_of_their_own(tmp_path: Path) -> None:
    def quantize(path: Path) -> None:
        remove_head(path)
        with_config(pruned_heads=..., quantization_config={"quant_method": "awq"})(path)

    check(edited(save(tmp_path / "whole"), tmp_path / "m", quantize))
