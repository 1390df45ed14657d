"""Small real things to test data with: configs, tokenizers, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from surgery.config.schema import DataConfig, Task
from surgery.data.module import TextData

CONF = Path(__file__).parents[2] / "conf" / "data"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
PAD, BOS, EOS, UNK, MASK = range(5)
WORDS = [f"w{number}" for number in range(59)]
VOCAB = len(SPECIAL) + len(WORDS)


def data_config(kind: str = "text", **fields: Any) -> DataConfig:
    """`data=<kind>` with overrides, small windows unless told otherwise."""
    small = {"seq_len": 8, "batch_size": 2}
    merged = OmegaConf.merge(
        OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{kind}.yaml"), small, fields
    )
    cfg = OmegaConf.to_object(merged)
    assert isinstance(cfg, DataConfig)
    return cfg


def word_tokenizer(
    *, begins: bool = False, ends: bool = False, **tokens: str
) -> PreTrainedTokenizerFast:
    """One token per word: `w7` is 12. `tokens` names the special ones, e.g. eos_token="</s>".

    Args:
        begins, ends: whether its own template adds `<s>` before and `</s>` after a text.
    """
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = " ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends)
    if begins or ends:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **tokens)


def ids_of(text: str) -> list[int]:
    """What `word_tokenizer` makes of words, by the rule it was built from."""
    return [len(SPECIAL) + int(word[1:]) for word in text.split()]


def documents(count: int, *, longest: int = 9) -> list[str]:
    """Different texts of 1 to `longest` words."""
    return [
        " ".join(
            WORDS[(5 * index + 3 * place + index // 7) % len(WORDS)]
            for place in range(1 + index * 7 % longest)
        )
        for index in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path: Path, texts: Sequence[str]) -> str:
    """Write texts to a file of any type we read."""
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n")
        return str(path)
    return write_rows(path, [{"text": text} for text in texts])


def text_data(
    path: Any, tokenizer: Any = None, *, task: Task = Task.causal_lm, seed: int = 0, **fields: Any
) -> TextData:
    """`TextData` over files, with the word tokenizer unless another is given."""
    tokenizer = tokenizer or word_tokenizer(eos_token="</s>", pad_token="<pad>")
    return TextData(data_config(path=path, **fields), tokenizer, task, seed)


def all_rows(data: TextData, half: str = "train") -> list[dict[str, Any]]:
    """Every row of a half, in file order."""
    data.setup()
    rows = data._train if half == "train" else data._held_out
    return [{k: np.asarray(v).tolist() for k, v in row.items()} for row in rows or []]
