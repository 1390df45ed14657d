"""The texts of probes: source code of the standard library, or CoNLL-U files."""

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
from surgery.lab.analysis.python_source import find_python_relations
from surgery.lab.analysis.spans import ProbeText, make_probe_text

PYTHON = "python"


def check_probes(probes: Sequence[str]) -> None:
    """Check the probes.

    Raises:
        ConfigError: a probe is neither ``python`` nor a readable file, or two have the same name.
    """
    names = [name_probe(probe) for probe in probes]
    for probe, name in zip(probes, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(
                KEY,
                "two probes have the same name",
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


def name_probe(probe: str) -> str:
    """Name a probe for its relations: ``python``, or the name of the file."""
    return probe if probe == PYTHON else Path(probe).stem


def make_probe_texts(
    probe: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
) -> list[ProbeText]:
    """Make at most `count` windows of source code, or sentences, drawn by the seed.

    Source code is one window of each file of the standard library that training may read (see
    `data.val_fraction`). Sentences of more than `seq_len` tokens are left out, and a printed line
    says so.

    Raises:
        ConfigError: the tokenizer does not give the positions of its tokens, or a file is broken.
    """
    framing = find_special_tokens(tokenizer)
    room = seq_len - len(framing[0]) - len(framing[1])
    rng = random.Random(seed)
    if probe != PYTHON:
        sentences = read_conllu(Path(probe).expanduser())
        rng.shuffle(sentences)
        drawn = [make_probe_text(one, tokenizer, room, framing) for one in sentences[:count]]
        fitting = [text for text in drawn if text is not None]
        if len(fitting) < len(drawn):
            left_out = len(drawn) - len(fitting)
            say(f"  {left_out} sentences are longer than {seq_len} tokens: left out")
        return fitting
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
            related = find_python_relations(files[path])
            text = (
                None if related is None else make_probe_text(related, tokenizer, room, framing, rng)
            )
            if text is not None and text.pairs:
                texts.append(text)
                steps.advance()
    return texts
