"""Universal Dependencies: sentences of a CoNLL-U file with their relations.

https://universaldependencies.org/format.html. Read are the columns ID, FORM, HEAD, DEPREL and, of
MISC, SpaceAfter. Subtypes of relations (``nsubj:pass``) count as the relation; the root hangs on
nothing and is no pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import ConfigError
from surgery.lab.analysis.relations import Related

KEY = "analysis.probes"
_COLUMNS = 10
_WORD, _RANGE, _EMPTY = re.compile(r"[1-9]\d*"), re.compile(r"(\d+)-(\d+)"), re.compile(r"\d+\.\d+")
_Line = tuple[int, list[str]]


def read_conllu(path: Path) -> list[Related]:
    """Every sentence, in order.

    Raises:
        ConfigError: a file that cannot be read, holds no sentence, or breaks the format; with the
            number of the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(KEY, f"cannot be read: {error.strerror}", given=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(KEY, "is no UTF-8 text", given=str(path)) from None
    found = [_sentence(lines, path) for lines in _blocks(text, path)]
    if not found:
        raise ConfigError(KEY, "holds no sentence", given=str(path), valid="a CoNLL-U file")
    return found


def _blocks(text: str, path: Path) -> Iterator[list[_Line]]:
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
                raise _broken(path, number, f"has {len(columns)} columns, not {_COLUMNS}")
            block.append((number, columns))
    if block:
        yield block


def _sentence(lines: list[_Line], path: Path) -> Related:
    found = Related("", [])
    until = 0  # the last word that lies inside a multi-word token
    heads: list[tuple[int, str, str]] = []
    for number, columns in lines:
        name, form = columns[0], columns[1]
        if _EMPTY.fullmatch(name):  # of enhanced dependencies: no word of the text
            continue
        span = _RANGE.fullmatch(name)
        if span:
            first, until = int(span[1]), int(span[2])
            if first != len(found.words) + 1 or until < first:
                raise _broken(path, number, f"has the ID {name} after word {len(found.words)}")
            inside = _append(found, form, columns)
            continue
        if not _WORD.fullmatch(name) or int(name) != len(found.words) + 1:
            raise _broken(path, number, f"has the ID {name} after word {len(found.words)}")
        found.words.append(inside if int(name) <= until else _append(found, form, columns))
        heads.append((number, columns[6], columns[7]))
    if until > len(found.words):
        raise _broken(path, lines[-1][0], f"ends before word {until} of a multi-word token")
    for dependent, (number, head, label) in enumerate(heads):
        if not re.fullmatch(r"\d+", head) or int(head) > len(found.words):
            raise _broken(path, number, f"has the HEAD {head} in {len(found.words)} words")
        if int(head) > 0:
            found.relate(label.partition(":")[0], dependent, int(head) - 1)
    found.text = found.text.rstrip(" ")
    return found


def _append(found: Related, form: str, columns: list[str]) -> tuple[int, int]:
    start = len(found.text)
    found.text += form
    span = (start, len(found.text))
    if "SpaceAfter=No" not in columns[9].split("|"):
        found.text += " "
    return span


def _broken(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(
        KEY,
        f"line {number} {problem}",
        given=f"{path}:{number}",
        valid="a CoNLL-U file of Universal Dependencies",
    )
