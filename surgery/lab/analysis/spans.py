"""Words to tokens: which tokens of a window make up which word."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.data.windows import encode
from surgery.errors import ConfigError
from surgery.lab.analysis.relations import Related


@dataclass(frozen=True)
class ProbeText:
    """One pass of a model, with words on its tokens.

    Attributes:
        input_ids: [N].
        units: [N], the word that each token belongs to, numbered from 0 in reading order; -1 for
            none. Words that share a token count as one.
        pairs: relation → [P, 2], (dependent, head) by word.
    """

    input_ids: torch.Tensor
    units: torch.Tensor
    pairs: Mapping[str, torch.Tensor]


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N] without special tokens, and the characters [N, 2] that each stands for.

    Raises:
        ConfigError: a tokenizer that does not say so.
    """
    if type(tokenizer) is ByT5Tokenizer:
        sizes = [len(letter.encode()) for letter in text]
        starts = np.repeat(np.arange(len(text)), sizes)
        return encode(tokenizer, [text])[0], np.stack([starts, starts + 1], axis=1)
    if not tokenizer.is_fast:
        raise ConfigError(
            "analysis.probes",
            "this tokenizer does not say which characters a token stands for",
            given=type(tokenizer).__name__,
            valid="a fast tokenizer, or analysis.probes=[]",
        )
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.asarray(made["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.asarray(made["input_ids"], dtype=np.int64), spans


def units_of(
    words: Sequence[tuple[int, int]], spans: np.ndarray
) -> tuple[np.ndarray, list[int | None]]:
    """Unit of each token [N] (-1: none), and of each word (``None``: it has no token here).

    Args:
        words: character spans, by their starts.
        spans: [N, 2], of the tokens.
    """
    units = np.full(len(spans), -1, dtype=np.int64)
    of_words: list[int | None] = []
    count = 0
    for start, end in words:
        first = int(np.searchsorted(spans[:, 1], start, side="right"))
        last = int(np.searchsorted(spans[:, 0], end, side="left"))  # exclusive
        if first >= last:
            of_words.append(None)
            continue
        taken = units[first:last]
        held = taken[taken >= 0]
        unit = int(held[0]) if len(held) else count
        count = max(count, unit + 1)
        units[first:last] = unit
        of_words.append(unit)
    return units, of_words


def probe_text(
    related: Related,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    frame: tuple[Sequence[int], Sequence[int]],
    rng: random.Random | None = None,
) -> ProbeText | None:
    """At most `room` tokens of a text; ``None`` where it is longer and there is no `rng` to cut it.

    Words that the cut goes through are none, and pairs need both of theirs.

    Args:
        frame: special tokens before and after.
        rng: draws where a longer text is cut out.
    """
    ids, spans = token_spans(tokenizer, related.text)
    if len(ids) > room:
        if rng is None:
            return None
        at = rng.randrange(len(ids) - room + 1)
        ids, spans = ids[at : at + room], spans[at : at + room]
    if not len(ids):
        return None
    begin, end = int(spans[0, 0]), int(spans[-1, 1])
    inside = [number for number, (a, b) in enumerate(related.words) if begin <= a and b <= end]
    units, of_words = units_of([related.words[number] for number in inside], spans)
    unit = dict(zip(inside, of_words, strict=True))
    pairs = {}
    for relation, found in related.pairs.items():
        kept = [(unit.get(a), unit.get(b)) for a, b in found]
        whole = [pair for pair in kept if None not in pair and pair[0] != pair[1]]
        if whole:
            pairs[relation] = torch.tensor(whole)
    before, after = (np.asarray(list(part), dtype=np.int64) for part in frame)
    outside = np.full(len(before), -1), np.full(len(after), -1)
    return ProbeText(
        torch.from_numpy(np.concatenate([before, ids.astype(np.int64), after])),
        torch.from_numpy(np.concatenate([outside[0], units, outside[1]])),
        pairs,
    )
