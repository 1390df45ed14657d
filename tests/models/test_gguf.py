"""A GGUF is a source like a directory; what transformers would leave out of it is refused."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from surgery.config.schema import Dtype, Task
from surgery.errors import ConfigError
from surgery.models import gguf_file
from surgery.models.gguf_header import read_gguf_header
from surgery.models.source import ModelSource
from tests.models.gguf_files import TEMPLATE, WORDS, Kind, make_llama, write_gguf
from tests.models.sources import source

TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 4 query and 2 KV heads in fp32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_llama())


def refuse(found: ModelSource, key: str = "model.path") -> ConfigError:
    """Refused before any weight is read, and by the loader too."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as planned:
        found.check_shapes(found.build_meta_model())
    with pytest.raises(ConfigError) as loaded:
        found.load()
    assert str(planned.value) == str(loaded.value)
    assert planned.value.key == key
    assert planned.value.given == found.spec.path
    assert time.monotonic() - start < 20
    return planned.value


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


class TestWhole:
    def test_it_is_the_model_that_was_written(self, whole: Path) -> None:
        model = source(whole).load()
        assert torch.equal(logits(model), logits(make_llama()))
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert source(whole).name == str(whole)

    def test_nothing_of_the_gguf_is_left(self, whole: Path, tmp_path: Path) -> None:
        """Saved, it is a directory like any other."""
        model = source(whole, dtype=Dtype.bfloat16).load()
        assert not hasattr(model.config, "quantization_config")
        assert getattr(model, "hf_quantizer", None) is None
        # As of any bf16 model: rounded, far positions would turn by whole turns.
        exact = make_llama().model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)
        model.save_pretrained(tmp_path)
        source(whole).load_tokenizer().save_pretrained(tmp_path)
        again = source(tmp_path, dtype=Dtype.auto)
        assert torch.equal(logits(again.load()), logits(model))
        assert again.load().dtype is torch.bfloat16
        assert again.load_tokenizer()("ab  12")["input_ids"] == [
            WORDS.index(word) for word in ("ab", "ĠĠ", "1", "2")
        ]

    @pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
    def test_quantized_weights_are_those_of_the_package(self, tmp_path: Path, kind: Any) -> None:
        original = make_llama(tie_word_embeddings=True)
        model = source(write_gguf(tmp_path / "q.gguf", original, kind=kind)).load()
        weight = original.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        found = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
        assert np.array_equal(found, expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_what_lies_beside_it_is_not_read(self, whole: Path, tmp_path: Path) -> None:
        """An adapter or a tokenizer of another model in the same folder of downloads."""
        alone = tmp_path / "tiny.GGUF"
        alone.write_bytes(whole.read_bytes())
        for name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
            (tmp_path / name).write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        found = source(alone)
        assert torch.equal(logits(found.load()), logits(make_llama()))
        assert len(found.load_tokenizer()) == 32

    def test_a_path_relative_to_the_directory(
        self, whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(whole.parent)
        assert torch.equal(logits(source("tiny.gguf").load()), logits(make_llama()))

    def test_a_classifier_has_its_body_and_a_head_of_its_own(self, whole: Path) -> None:
        found = source(whole, task=Task.sequence_classification, num_labels=3)
        found.check_shapes(found.build_meta_model())
        model = found.load()
        assert model.score.weight.shape == (3, 64)
        assert torch.equal(model.model.norm.weight, make_llama().model.norm.weight)

    def test_special_tokens_are_those_of_the_metadata(self, whole: Path) -> None:
        fields = read_gguf_header(whole).fields
        tokenizer, config = source(whole).load_tokenizer(), source(whole).load_config()
        model = source(whole).load()
        for held in (tokenizer, config, model.generation_config):
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
                stated = fields[f"tokenizer.ggml.{key}_token_id"]
                assert getattr(held, f"{name}_token_id") == stated
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer("ab<end>")["input_ids"] == [WORDS.index("ab"), 0]

    def test_no_token_is_made_up(self, whole: Path, tmp_path: Path) -> None:
        """GPT-2's class brings <|endoftext|>, for which this vocabulary has no row."""
        tokenizer = source(whole).load_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert sorted(found.get_vocab().values()) == list(range(32))
            assert found.unk_token is None
            assert found.chat_template == TEMPLATE
            assert max(found("ab<|endoftext|>")["input_ids"]) < 32


class TestSplit:
    """How text is split is part of the model: another way gives it other tokens than it learnt."""

    def tokenize(self, folder: Path, pre: str) -> list[str]:
        path = write_gguf(folder / "split.gguf", make_llama(), pre=pre)
        tokenizer = source(path).load_tokenizer()
        return tokenizer.convert_ids_to_tokens(tokenizer("a  1")["input_ids"])

    def test_before_each_digit(self, tmp_path: Path) -> None:
        assert self.tokenize(tmp_path, "smollm") == ["a", "ĠĠ", "1"]

    def test_as_gpt2(self, tmp_path: Path) -> None:
        assert self.tokenize(tmp_path, "gpt-2") == ["a", "Ġ", "Ġ", "1"]

    def test_as_transformers_knows_it(self, tmp_path: Path) -> None:
        assert self.tokenize(tmp_path, "llama-bpe") == ["a", "Ġ", "Ġ", "1"]

    def test_in_a_way_that_nobody_knows(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "split.gguf", make_llama(), pre="by-moonlight")
        with pytest.raises(ConfigError, match="splits text by the rule 'by-moonlight'") as caught:
            source(path).load_tokenizer()
        assert caught.value.key == "model.tokenizer"
        source(path).load()
        assert len(source(path, tokenizer="bytes").load_tokenizer()) == 259


def remove(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def add(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


class TestLeftOut:
    """transformers would load these in silence, as another model."""

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (add("blk.0.attn_q.bias", 64), "there is no place for its blk.0.attn_q.bias"),
            (add("rope_freqs.weight", 8), "there is no place for its rope_freqs.weight"),
            (add("blk.2.attn_q.weight", 64, 64), "there is no place for its blk.2.attn_q.weight"),
            (remove("blk.1.attn_k.weight"), "layers.1.self_attn.k_proj.weight is missing"),
            (remove("token_embd.weight"), "model.embed_tokens.weight is missing"),
            (
                add("blk.1.attn_k.weight", 48, 64),
                "k_proj.weight is [48, 64], but should be [32, 64]",
            ),
        ],
    )
    def test_a_tensor(self, tmp_path: Path, change: Any, said: str) -> None:
        path = write_gguf(tmp_path / "x.gguf", make_llama(), change=change)
        error = refuse(source(path))
        assert said in error.problem
        assert error.valid == "the original model's directory or hub id"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.factor", 4.0),
            ("attention.sliding_window", 64),
            ("attention.key_length", 32),
            ("logit_scale", 0.25),
        ],
    )
    def test_metadata(self, tmp_path: Path, name: str, value: Any) -> None:
        path = write_gguf(tmp_path / "x.gguf", make_llama(), fields={f"llama.{name}": value})
        assert f"it says {name}={value!r}, which is not read" in refuse(source(path)).problem

    def test_metadata_that_says_the_same_or_nothing(self, tmp_path: Path) -> None:
        fields: dict[str, Any] = {
            "llama.attention.key_length": 16,
            "llama.attention.value_length": 16,
            "llama.rope.scaling.type": "none",
            "llama.expert_count": 0,
            "llama.tensor_data_layout": "Meta AI original pth",
            "general.sampling.temp": 0.7,
        }
        path = write_gguf(tmp_path / "x.gguf", make_llama(), fields=fields)
        source(path).load()


class TestUnreadable:
    def test_an_architecture(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "x.gguf", make_llama(), architecture="rwkv7")
        assert "architecture rwkv7 is not supported" in refuse(source(path)).problem

    def test_a_quantization(self, tmp_path: Path, whole: Path) -> None:
        """Of the format, but dequantized by nobody: Q8_1, an intermediate of llama.cpp."""
        path = tmp_path / "x.gguf"
        name = b"blk.0.attn_v.weight"
        content = whole.read_bytes()
        place = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
        for number, said in (
            (int(Kind.Q8_1), "blk.0.attn_v.weight is quantized as Q8_1, which cannot be read"),
            (9_999, "blk.0.attn_v.weight has the unknown type 9999"),
        ):
            path.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :])
            assert said in refuse(source(path)).problem

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.999])
    def test_a_file_that_is_cut_short(self, tmp_path: Path, whole: Path, share: float) -> None:
        content = whole.read_bytes()
        path = tmp_path / "x.gguf"
        path.write_bytes(content[: int(share * len(content))])
        problem = refuse(source(path)).problem
        assert "cut short" in problem or "does not begin with GGUF" in problem

    def test_missing_packages(self, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("gguf", "accelerate"):
            with monkeypatch.context() as patch:
                patch.setitem(__import__("sys").modules, name, None)
                error = refuse(source(whole))
                assert name in error.problem
                assert error.valid is not None
                assert "pip install 'attention-surgery[real]'" in error.valid

    @pytest.mark.parametrize("path", ["no.gguf", "./no.gguf", "owner/name/no.gguf", "~/no.gguf"])
    def test_no_such_file(self, path: str) -> None:
        with pytest.raises(ConfigError, match="there is no such file") as caught:
            source(path).load_config()
        assert caught.value.given == path

    def test_a_revision(self, whole: Path) -> None:
        with pytest.raises(ConfigError, match="not local directories and files"):
            source(whole, revision="main").load_config()

    def test_a_directory_that_holds_one(self, whole: Path) -> None:
        (whole.parent / "config.json").write_text('{"model_type": "llama"}')
        try:
            with pytest.raises(ConfigError, match=r"has tiny\.gguf: name the file itself"):
                source(whole.parent).check_weights()
        finally:
            (whole.parent / "config.json").unlink()


class TestHostile:
    """Headers that would keep their reader busy for ever, or fill the memory."""

    def make(self, path: Path, *parts: bytes, tensors: int = 0, fields: int = 1) -> ModelSource:
        head = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)
        path.write_bytes(head + b"".join(parts) + b"\0" * 64)
        return source(path)

    def text(self, text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def field(self, name: str, kind: int, value: bytes) -> bytes:
        return self.text(name) + struct.pack("<I", kind) + value

    def named(self) -> bytes:
        return self.field("general.architecture", 8, self.text("llama"))

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (8, struct.pack("<Q", 2**62)),
            (9, struct.pack("<IQ", 0, 2**62)),
            (9, struct.pack("<IQ", 8, 2**40)),
            (9, struct.pack("<IQ", 9, 2)),
            (99, b""),
        ],
    )
    def test_a_field(self, tmp_path: Path, kind: int, value: bytes) -> None:
        found = self.make(tmp_path / "x.gguf", self.field("x", kind, value))
        assert "is no whole GGUF file" in refuse(found).problem

    @pytest.mark.parametrize(("tensors", "fields"), [(2**60, 1), (0, 2**60), (3, 1)])
    def test_counts(self, tmp_path: Path, tensors: int, fields: int) -> None:
        found = self.make(tmp_path / "x.gguf", self.named(), tensors=tensors, fields=fields)
        refuse(found)

    @pytest.mark.parametrize("dimensions", [(), (0,), (2**63, 2**63), (1,) * 5])
    def test_a_tensor(self, tmp_path: Path, dimensions: tuple[int, ...]) -> None:
        tensor = self.text("token_embd.weight") + struct.pack("<I", len(dimensions))
        tensor += b"".join(struct.pack("<Q", size) for size in dimensions)
        tensor += struct.pack("<IQ", 0, 0)
        path = tmp_path / "x.gguf"
        with pytest.raises(ConfigError):
            self.make(path, self.named(), tensor, tensors=1).load()

    def test_twice_the_same(self, tmp_path: Path) -> None:
        found = self.make(tmp_path / "x.gguf", self.named(), self.named(), fields=2)
        assert "general.architecture is there twice" in refuse(found).problem

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("block_count", 10**9, "block_count is 1000000000, and must be at most 10000"),
            ("attention.head_count", 10**9, "attention.head_count is 1000000000"),
            ("rope.freq_base", float("nan"), "rope.freq_base is nan"),
        ],
    )
    def test_sizes(self, tmp_path: Path, name: str, value: Any, said: str) -> None:
        packed = struct.pack("<f", value) if isinstance(value, float) else struct.pack("<I", value)
        field = self.field(f"llama.{name}", 6 if isinstance(value, float) else 4, packed)
        found = self.make(tmp_path / "x.gguf", self.named(), field, fields=2)
        assert said in refuse(found).problem

    def test_another_byte_order(self, tmp_path: Path) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + b"\0" * 64)
        assert "it is big-endian" in refuse(source(path)).problem

    def test_it_is_read_again_once_it_changes(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "x.gguf", make_llama())
        assert source(path).load_config().num_hidden_layers == 2
        write_gguf(path, make_llama(num_hidden_layers=1))
        assert source(path).load_config().num_hidden_layers == 1
        assert len(source(path).load().model.layers) == 1
        assert gguf_file.is_gguf(path)
