"""pytorch_model.bin is a source like safetensors; what a pickle could do beyond is refused."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from surgery.config.schema import Task
from surgery.errors import ConfigError
from surgery.models.pickled import read_pickled_shapes
from tests.families import family, logits
from tests.models.sources import edited, source, with_config

WEIGHTS, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"


def pickle_weights(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED, **options)
    (folder / WEIGHTS).unlink()


def as_torch_1_5(folder: Path) -> None:
    pickle_weights(folder, _use_new_zipfile_serialization=False)


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    placed = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("edit", [pickle_weights, as_torch_1_5, in_shards])
def test_it_is_the_model_that_was_saved(saved: Path, tmp_path: Path, edit: Any) -> None:
    found = source(edited(saved, tmp_path / "model", edit))
    found.check_shapes(found.build_meta_model())
    found.check_weights()
    expected = family("llama", dtype=torch.float32)
    assert torch.equal(logits(found.load()), logits(expected))


def test_safetensors_come_first(saved: Path, tmp_path: Path) -> None:
    """As transformers looks for them: the pickle is not even opened."""
    folder = edited(saved, tmp_path / "model", lambda d: (d / PICKLED).write_bytes(b"no pickle"))
    source(folder).load()


@pytest.mark.parametrize("edit", [pickle_weights, as_torch_1_5, in_shards])
def test_heads_that_the_weights_do_not_have(saved: Path, tmp_path: Path, edit: Any) -> None:
    """Said while planning, as for safetensors."""

    def change(folder: Path) -> None:
        edit(folder)
        with_config(num_key_value_heads=2)(folder)

    found = source(edited(saved, tmp_path / "model", change))
    with pytest.raises(ConfigError, match="but should be \\[16, 64\\]") as caught:
        found.check_shapes(found.build_meta_model())
    assert caught.value.key == "model.path"


def test_old_names_of_tensors(tmp_path: Path) -> None:
    """BERT of 2019: gamma and beta, which transformers still renames."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=61, num_hidden_layers=1, **sizes)).eval()
    model.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / PICKLED)
    (tmp_path / WEIGHTS).unlink()
    loaded = source(tmp_path, task=Task.masked_lm).load()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def compress(path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def cut(path: Path, **options: Any) -> None:
    torch.save({"x": torch.zeros(1000)}, path, **options)
    path.write_bytes(path.read_bytes()[:-500])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda p: torch.save({"x": Evil(p.with_name("ran"))}, p), "asks for posix.system"),
    "code, of old": (
        lambda p: torch.save(
            {"x": Evil(p.with_name("ran"))}, p, _use_new_zipfile_serialization=False
        ),
        "asks for posix.system",
    ),
    "a small storage": (
        lambda p: torch.save({"x": torch.zeros(1).expand(10**12)}, p),
        "x has the shape [1000000000000], and fewer values than that",
    ),
    "sparse": (lambda p: torch.save({"x": torch.eye(3).to_sparse()}, p), "x is not a plain dense"),
    "meta": (lambda p: torch.save({"x": torch.zeros(9, device="meta")}, p), "x is not a plain"),
    "nested": (lambda p: torch.save({"x": {"y": torch.zeros(3)}}, p), "x is of type dict"),
    "a list": (lambda p: torch.save([torch.zeros(3)], p), "it is not a dict of tensors"),
    "nothing": (lambda p: torch.save({}, p), "it is not a dict of tensors"),
    "numbers for names": (lambda p: torch.save({1: torch.zeros(3)}, p), "something else than a te"),
    "compressed": (compress, "it is compressed, as torch never writes it"),
    "cut short": (cut, "torch cannot read it"),
    "cut short, of old": (
        lambda p: cut(p, _use_new_zipfile_serialization=False),
        "torch cannot read it: unexpected EOF",
    ),
    "empty": (lambda p: p.write_bytes(b""), "torch cannot read it"),
    "text": (lambda p: p.write_bytes(b"hello"), "torch cannot read it"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_else_a_pickle_may_hold(saved: Path, tmp_path: Path, name: str) -> None:
    make, said = HOSTILE[name]
    folder = edited(saved, tmp_path / "model", lambda d: (d / WEIGHTS).unlink())
    make(folder / PICKLED)
    for action in (source(folder).check_weights, source(folder).load):
        with pytest.raises(ConfigError) as caught:
            action()
        assert caught.value.key == "model.path"
        assert said in caught.value.problem
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "named",
    ["../x.bin", "/etc/passwd", "x.safetensors", "no.bin", "evil.pt", "", 5, None, "model.json"],
)
def test_an_index_names_only_its_kind_in_its_directory(
    saved: Path, tmp_path: Path, named: Any
) -> None:
    folder = edited(saved, tmp_path / "model", in_shards)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = named
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(saved / WEIGHTS, folder / "x.safetensors")
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "x.bin")
    for action in (source(folder).check_weights, source(folder).load):
        with pytest.raises(ConfigError) as caught:
            action()
        assert caught.value.key == "model.path"
        assert "names" in caught.value.problem or "there is no" in caught.value.problem
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_read_again_once_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for size in (3, 5000):
        torch.save({"x": torch.zeros(size)}, path)
        assert read_pickled_shapes(path) == {"x": [size]}


@pytest.mark.parametrize("edit", [pickle_weights, in_shards])
def test_of_the_hub(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Any
) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    folder = edited(saved, repository / "snapshots" / ("0" * 40), edit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = family("llama", dtype=torch.float32)
    assert torch.equal(logits(source("owner/name").load()), logits(expected))
    # Whatever is loaded is looked at before.
    if edit is pickle_weights:
        torch.save({"x": Evil(tmp_path / "ran")}, folder / PICKLED)
    else:
        (folder / INDEX).write_text('{"weight_map": {"x": "../evil.bin"}}')
    with pytest.raises(ConfigError) as caught:
        source("owner/name").check_weights()
    assert caught.value.key == "model.path"
    assert "posix.system" in caught.value.problem or "../evil.bin" in caught.value.problem
    assert not (tmp_path / "ran").exists()
