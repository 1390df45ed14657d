"""What a model's length is, and that everything in an export says the new one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from surgery.cli import main
from surgery.execute.live import apply_
from surgery.models.length import read_length, state_length_, state_tokenizer_length_
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations

WORDS = ["<unk>", "</s>", "a", "b", "c"]
OLD, NEW = 16, 64
TEXT = " ".join(["a", "b", "c"] * 20)  # 60 words


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>", **options
    )


def make_config(length: int = OLD, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        pad_token_id=1,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama for 16 tokens, whose every file says 16."""
    model = LlamaForCausalLM(make_config(max_seq_len=OLD))
    model.generation_config = GenerationConfig(max_length=OLD, eos_token_id=1)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer(model_max_length=OLD).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def export(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def run(*overrides: str) -> Path:
        arguments = [
            "train.py",
            f"model.path={source}",
            "logger=none",
            f"hydra.run.dir={tmp_path / 'run'}",
            *overrides,
        ]
        monkeypatch.setattr("sys.argv", arguments)
        main()
        return tmp_path / "run" / "export"

    return run


def test_an_extended_model_is_not_truncated_at_its_old_length(export: Callable[..., Path]) -> None:
    folder = export(
        "stages=[plan,operate,export]",
        "attention=[rope]",
        "attention.rope.type=yarn",
        "attention.rope.factor=4",
    )
    read = AutoTokenizer.from_pretrained(folder)
    assert read.model_max_length == NEW
    assert len(read(TEXT, truncation=True)["input_ids"]) == 60
    assert len(read(TEXT * 2, truncation=True)["input_ids"]) == NEW
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_position_embeddings"], config["max_seq_len"]) == (NEW, NEW)
    assert GenerationConfig.from_pretrained(folder).max_length == NEW
    assert f"Longest input: {NEW} tokens." in (folder / "README.md").read_text()
    assert json.loads((folder.parent / "summary.json").read_text())["export"]["positions"] == NEW


def test_what_keeps_its_length_keeps_its_tokenizer(
    source: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    """Training truncates, which a tokenizer remembers: the export must not."""
    make_tokenizer(model_max_length=12).save_pretrained(source)
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"text": f"a b c a b {'c' * (i % 7)}", "label": 0}) + "\n" for i in range(60)
        )
    )
    folder = export(
        "stages=[plan,operate,train,export]",
        "attention=[prune_heads]",
        "attention.prune_heads.heads=[1]",
        "model.task=sequence_classification",
        "data=text",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.layout=padded",
        "data.seq_len=4",
        "data.batch_size=4",
        "trainer.max_steps=1",
        "callbacks.checkpoint=null",
    )
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert "max_length" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 12


def test_a_limit_in_the_file_of_the_tokenizer_moves_too(tmp_path: Path) -> None:
    """`tokenizers` reads the limit of tokenizer.json alone."""
    tokenizer = make_tokenizer(model_max_length=OLD)
    tokenizer(TEXT, truncation=True)
    tokenizer.save_pretrained(tmp_path / "before")
    read = AutoTokenizer.from_pretrained(tmp_path / "before")
    assert len(Tokenizer.from_file(str(tmp_path / "before" / "tokenizer.json")).encode(TEXT)) == OLD
    state_tokenizer_length_(read, make_config(), make_config(NEW))
    read.save_pretrained(tmp_path / "after")
    assert len(Tokenizer.from_file(str(tmp_path / "after" / "tokenizer.json")).encode(TEXT)) == 60
    assert (
        json.loads((tmp_path / "after" / "tokenizer_config.json").read_text())["max_length"] == NEW
    )


@pytest.mark.parametrize(
    ("held", "before", "after", "said"),
    [
        (OLD, OLD, NEW, NEW),
        (8, OLD, NEW, NEW),
        (None, OLD, NEW, None),  # without a limit
        (NEW, NEW, OLD, OLD),
        (8, NEW, OLD, 8),  # a shorter limit still holds
        (8, OLD, OLD, 8),
        (4096, OLD, OLD, 4096),
    ],
)
def test_where_a_tokenizer_truncates(
    held: int | None, before: int, after: int, said: int | None
) -> None:
    tokenizer = make_tokenizer(**({} if held is None else {"model_max_length": held}))
    unlimited = make_tokenizer().model_max_length
    state_tokenizer_length_(tokenizer, make_config(before), make_config(after))
    assert tokenizer.model_max_length == (unlimited if said is None else said)


def test_other_numbers_stay() -> None:
    """A limit that is not the model's length is a choice of somebody."""
    model = LlamaForCausalLM(make_config(NEW, max_seq_len=12, sliding_window=OLD))
    model.generation_config = GenerationConfig(max_length=20)
    state_length_(model, make_config(max_seq_len=12, sliding_window=OLD))
    assert (model.config.max_seq_len, model.config.sliding_window) == (12, OLD)
    assert model.generation_config.max_length == 20


def test_dynamic_scaling_serves_more_than_it_begins_at() -> None:
    """`max_position_embeddings` stays: beyond it the scaling begins."""
    model = LlamaForCausalLM(make_config(max_seq_len=OLD)).eval()
    before = copy.deepcopy(model.config)
    assert read_length(before) == OLD
    operations = parse_operations({"rope": {"type": "dynamic", "factor": 4}})
    result = apply_(model, make_plan(model, operations))
    assert result.config.max_position_embeddings == OLD
    assert (read_length(result.config), result.config.max_seq_len) == (NEW, NEW)
    tokenizer = make_tokenizer(model_max_length=OLD)
    state_tokenizer_length_(tokenizer, before, result.config)
    assert len(tokenizer(TEXT, truncation=True)["input_ids"]) == 60
