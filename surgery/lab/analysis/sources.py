"""Where probes take their texts from: the standard library's source, or CoNLL-U files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from surgery.console import say, track_progress
from surgery.data.sources import is_held_out
from surgery.data.stdlib import read_stdlib
from surgery.data.windows import find_special_tokens
from surgery.errors import ConfigError
from surgery.lab.analysis.conllu import KEY, read_conllu
from surgery.lab.analysis.python_source import python_relations
from surgery.lab.analysis.spans import ProbeText, probe_text

PYTHON = "python"


def check_probes(probes: Sequence[str]) -> None:
    """Raises: ConfigError, for a probe that is neither ``python`` nor a file that can be read."""
    names = [probe_name(probe) for probe in probes]
    for probe, name in zip(probes, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(
                KEY,
                "two probes have one name",
                given=list(probes),
                valid="files with different names",
            )
        if probe != PYTHON and not Path(probe).expanduser().is_file():
            raise ConfigError(
                KEY,
                "there is no such file",
                given=probe,
                valid="python, or the path of a CoNLL-U file",
            )
        if probe != PYTHON:
            read_conllu(Path(probe).expanduser())


def probe_name(probe: str) -> str:
    """What its relations are named after: ``python``, or the file."""
    return probe if probe == PYTHON else Path(probe).stem


def probe_texts(
    probe: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
) -> list[ProbeText]:
    """At most `count` windows of source code, or sentences, drawn by the seed.

    Of the standard library, files that training reads (see `data.val_fraction`), a window of each.
    Sentences of more than `seq_len` tokens are left out, which is said.

    Raises:
        ConfigError: a tokenizer that does not say where its tokens lie, or a broken file.
    """
    framing = find_special_tokens(tokenizer)
    room = seq_len - len(framing[0]) - len(framing[1])
    rng = random.Random(seed)
    if probe != PYTHON:
        sentences = read_conllu(Path(probe).expanduser())
        rng.shuffle(sentences)
        made = [probe_text(one, tokenizer, room, framing) for one in sentences[:count]]
        found = [text for text in made if text is not None]
        if len(found) < len(made):
            say(f"  {len(made) - len(found)} sentences are longer than {seq_len} tokens: left out")
        return found
    files = {
        path: text for path, text in read_stdlib().items() if not is_held_out(path, val_fraction)
    }
    paths = sorted(files)
    rng.shuffle(paths)
    texts: list[ProbeText] = []
    with track_progress("analysis, Python source", min(count, len(paths))) as steps:
        for path in paths:
            if len(texts) == count:
                break
            related = python_relations(files[path])
            text = None if related is None else probe_text(related, tokenizer, room, framing, rng)
            if text is not None and text.pairs:
                texts.append(text)
                steps.advance()
    return texts
