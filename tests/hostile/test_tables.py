"""Score tables, text and command lines that are damaged or meant to do harm."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from surgery.config.schema import Task
from surgery.data.module import TextData
from surgery.errors import ConfigError, SurgeryError
from surgery.files import MOST_NESTED, exceeds_nesting, find_unreadable, read_json
from surgery.importance.score_file import read_scores
from surgery.importance.table import ScoreTable
from surgery.refusals import refuse_deep
from tests.data.making import data_config, text_data
from tests.hostile.bases import Bases
from tests.hostile.cases import DEEP

KEY = "attention.prune_heads.scores"
ROW = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"scores": [ROW, ROW], "layers": 5}, "layers: must be a list, not 5"),
        ({"scores": [ROW, ROW], "layers": None}, "layers: must be a list, not None"),
        ({"scores": [ROW, ROW], "layers": [0, "1"]}, "layers[1]: must be a whole number"),
        ({"scores": [ROW, ROW], "layers": [0, -1]}, "layers[1]: must be at least 0"),
        ({"scores": [ROW, ROW], "layers": [0, 0]}, "a number for each of the 2 rows"),
        ({"scores": [ROW, 5]}, "scores[1]: must be a list, not 5"),
        ({"scores": 5}, "scores: must be a list, not 5"),
        ({"scores": [ROW, [1, 2, 3, 10**400]]}, "is not a finite number"),
        ({"scores": [ROW, [1, 2, 3, math.nan]]}, "is not a finite number"),
        ({"scores": [ROW, [1, 2, 3, math.inf]]}, "is not a finite number"),
        ({"scores": [ROW, [1, 2, 3, True]]}, "is not a finite number"),
        (5, "is not a score table"),
        ("x", "is not a score table"),
    ],
)
def test_score_tables(bases: Bases, tmp_path: Path, table: Any, said: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_scores(str(path), bases.sites, KEY)
    assert caught.value.key == KEY


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"PAR1",
        b"9" * 5000,
        gzip.compress(b"[]", mtime=0),  # else the name of the test holds the time
    ],
)
@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_score_files_of_garbage(bases: Bases, tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"scores.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_scores(str(path), bases.sites, KEY)
    assert caught.value.key == KEY


@pytest.mark.parametrize("path", ["/dev/zero", "/", "~nobody-here/x", "x\0y", "x" * 5000])
def test_score_files_that_are_none(bases: Bases, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_scores(path, bases.sites, KEY)
    assert caught.value.key == KEY


@pytest.mark.parametrize("data", [5, [], {"format": 1}, {"format": 1, "layers": 5, "sites": None}])
def test_a_table_in_memory(data: Any) -> None:
    with pytest.raises(SurgeryError, match="score table"):
        ScoreTable.from_json(data)


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        ("[" * MOST_NESTED + "]" * MOST_NESTED, False),
        ("[" * (MOST_NESTED + 1), True),
        ('{"a":' * (MOST_NESTED + 1), True),
        ("[]" * 1000, False),
        ('"' + "[" * 1000 + '"', False),
        ('"\\"' + "[" * 1000 + '"', False),
        ('"\\\\"' + "[" * 1000, True),
        ('{"a": "\n', False),
        ("", False),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_nesting_is_counted_outside_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, deep: bool, chunk: int
) -> None:
    monkeypatch.setattr("surgery.files._CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    assert exceeds_nesting(path) is deep


def test_what_is_read_is_a_regular_file() -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(Path("/dev/zero"))


@pytest.mark.parametrize("streaming", ["never", "always"])
@pytest.mark.parametrize("deep", ['{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP + "]" * DEEP])
def test_rows_nested_deeper_than_a_parser_can_go(tmp_path: Path, deep: str, streaming: str) -> None:
    """pyarrow recurses into them until the process ends."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "more": ' + deep + "}\n")
    with pytest.raises(ConfigError, match="nested more than 100 levels") as caught:
        text_data(str(path), streaming=streaming).setup()
    assert caught.value.key == "data.path"


@pytest.mark.parametrize("content", ["null\n", 'null\n{"text": "a"}\n', '{"text": null} null', "n"])
def test_rows_of_null(tmp_path: Path, content: str) -> None:
    """pyarrow takes the first of a block for a pointer, and the process ends."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="a row is not an object") as caught:
        text_data(str(path)).setup()
    assert caught.value.key == "data.path"


@pytest.mark.parametrize("content", ['{"text": null}', '[null, "null"]', '"n"', "[]", ""])
def test_a_null_within_a_row_is_none_of_these(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert find_unreadable(path) is None


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_rows_that_are_no_utf8(tmp_path: Path, streaming: str) -> None:
    """pyarrow passes on what stands in a string of JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "w1 w2"}\n' * 20 + b'{"text": "w1 \x8b"}\n')
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        text_data(str(path), streaming=streaming).setup()
    assert caught.value.key == "data.path"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_what_would_be_unpacked(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "w1"}\n'))
    with pytest.raises(ConfigError, match="is compressed") as caught:
        text_data(str(path)).setup()
    assert caught.value.key == "data.path"


@pytest.mark.parametrize("key", ["path", "val_path"])
@pytest.mark.parametrize(
    "given", [5, 0.5, True, {"a": "b"}, [5], [None], [[]], "", "x\0y", "~no/x"]
)
def test_paths_of_other_types(bases: Bases, tmp_path: Path, key: str, given: Any) -> None:
    (tmp_path / "good.txt").write_text("w1 w2 w3\n\n" * 40)
    cfg = data_config(**{"path": str(tmp_path / "good.txt"), key: given})
    with pytest.raises(ConfigError) as caught:
        TextData(cfg, bases.tokenizer, Task.causal_lm, seed=0).setup()
    assert caught.value.key == f"data.{key}"


@pytest.mark.parametrize("value", ["[" * 400, "{a:" * 400, "[" * 21 + "]" * 21])
def test_an_override_nested_too_deeply(value: str) -> None:
    """Hydra's parser recurses, and Python ends it with an error of its own."""
    with pytest.raises(ConfigError, match="nested too deeply") as caught:
        refuse_deep(["+recipe=gqa_convert", f"+data.path={value}"])
    assert caught.value.key == "data.path"
    refuse_deep(["data.path=" + "[" * 20 + "]" * 20, "data.path=" + "[]" * 100])
