"""Read Universal Dependencies: the sentences of a CoNLL-U file with their relations.

https://universaldependencies.org/format.html. The columns ID, FORM, HEAD, DEPREL are used, and
SpaceAfter of MISC. Subtypes of relations (``nsubj:pass``) count as the relation. The root has no
head, so it makes no pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import ConfigError
from surgery.lab.analysis.spans import RelatedText

KEY = "analysis.probes"
_COLUMNS = 10
_WORD, _RANGE, _EMPTY = re.compile(r"[1-9]\d*"), re.compile(r"(\d+)-(\d+)"), re.compile(r"\d+\.\d+")
_Line = tuple[int, list[str]]


def read_conllu(path: Path) -> list[RelatedText]:
    """Read every sentence of a file, in order.

    Raises:
        ConfigError: the file cannot be read, has no sentences, or breaks the format; with the
            number of the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(KEY, f"cannot be read: {error.strerror}", given=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(KEY, "is not UTF-8 text", given=str(path)) from None
    sentences = [_parse_sentence(lines, path) for lines in _split_blocks(text, path)]
    if not sentences:
        raise ConfigError(KEY, "has no sentences", given=str(path), valid="a CoNLL-U file")
    return sentences


def _split_blocks(text: str, path: Path) -> Iterator[list[_Line]]:
    block: list[_Line] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            if block:
                yield block
            block = []
        elif not line.startswith("#"):
            columns = line.split("\t")
            if len(columns) != _COLUMNS:
                raise _make_error(path, number, f"has {len(columns)} columns, not {_COLUMNS}")
            block.append((number, columns))
    if block:
        yield block


def _parse_sentence(lines: list[_Line], path: Path) -> RelatedText:
    sentence = RelatedText("", [])
    until = 0  # the last word inside a multi-word token
    heads: list[tuple[int, str, str]] = []
    for number, columns in lines:
        name, form = columns[0], columns[1]
        if _EMPTY.fullmatch(name):  # an empty node of enhanced dependencies is not in the text
            continue
        span = _RANGE.fullmatch(name)
        if span:
            first, until = int(span[1]), int(span[2])
            if first != len(sentence.words) + 1 or until < first:
                problem = f"has the ID {name} after word {len(sentence.words)}"
                raise _make_error(path, number, problem)
            inside = _append_form(sentence, form, columns)
            continue
        if not _WORD.fullmatch(name) or int(name) != len(sentence.words) + 1:
            raise _make_error(path, number, f"has the ID {name} after word {len(sentence.words)}")
        own = inside if int(name) <= until else _append_form(sentence, form, columns)
        sentence.words.append(own)
        heads.append((number, columns[6], columns[7]))
    count = len(sentence.words)
    if until > count:
        raise _make_error(path, lines[-1][0], f"ends before word {until} of a multi-word token")
    for dependent, (number, head, label) in enumerate(heads):
        if not re.fullmatch(r"\d+", head) or int(head) > count:
            raise _make_error(path, number, f"has the HEAD {head} in {count} words")
        if int(head) > 0:
            sentence.relate(label.partition(":")[0], dependent, int(head) - 1)
    sentence.text = sentence.text.rstrip(" ")
    return sentence


def _append_form(sentence: RelatedText, form: str, columns: list[str]) -> tuple[int, int]:
    start = len(sentence.text)
    sentence.text += form
    span = (start, len(sentence.text))
    if "SpaceAfter=No" not in columns[9].split("|"):
        sentence.text += " "
    return span


def _make_error(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(
        KEY,
        f"line {number} {problem}",
        given=f"{path}:{number}",
        valid="a CoNLL-U file of Universal Dependencies",
    )
