"""Texts with words and relations, and which tokens of a window belong to which word."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.data.windows import encode
from surgery.errors import ConfigError


@dataclass
class RelatedText:
    """A text, or a part of one, with words and relations between them.

    Attributes:
        text: the text for a tokenizer.
        words: character span [start, end) of each word, ascending; two words of one contraction
            may have the same span.
        pairs: relation → (dependent, head), numbers of words.
    """

    text: str
    words: list[tuple[int, int]]
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def relate(self, relation: str, dependent: int, head: int) -> None:
        if dependent != head:
            self.pairs.setdefault(relation, []).append((dependent, head))


@dataclass(frozen=True)
class ProbeText:
    """The input of one pass, with the words of its tokens.

    Attributes:
        input_ids: [N].
        units: [N], the word of each token, numbered from 0 in reading order; -1 for none. Words
            that share a token count as one.
        pairs: relation → [P, 2], (dependent, head) by word.
    """

    input_ids: torch.Tensor
    units: torch.Tensor
    pairs: Mapping[str, torch.Tensor]


def find_token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Find token ids [N] without special tokens, and the character span [N, 2] of each token.

    Raises:
        ConfigError: the tokenizer does not give spans.
    """
    if type(tokenizer) is ByT5Tokenizer:
        sizes = [len(letter.encode()) for letter in text]
        starts = np.repeat(np.arange(len(text)), sizes)
        return encode(tokenizer, [text])[0], np.stack([starts, starts + 1], axis=1)
    if not tokenizer.is_fast:
        raise ConfigError(
            "analysis.probes",
            "this tokenizer does not give the characters of its tokens",
            given=type(tokenizer).__name__,
            valid="a fast tokenizer, or analysis.probes=[]",
        )
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.asarray(output["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.asarray(output["input_ids"], dtype=np.int64), spans


def assign_units(
    words: Sequence[tuple[int, int]], spans: np.ndarray
) -> tuple[np.ndarray, list[int | None]]:
    """Assign a unit to each token [N] (-1: none), and to each word (``None``: it has no token).

    Args:
        words: character spans, sorted by their starts.
        spans: [N, 2], character spans of the tokens.
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
        assigned = units[first:last]
        assigned = assigned[assigned >= 0]
        unit = int(assigned[0]) if len(assigned) else count
        count = max(count, unit + 1)
        units[first:last] = unit
        of_words.append(unit)
    return units, of_words


def make_probe_text(
    related: RelatedText,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    frame: tuple[Sequence[int], Sequence[int]],
    rng: random.Random | None = None,
) -> ProbeText | None:
    """Make the input for a text of at most `room` tokens; ``None`` if it is longer without `rng`.

    Words at a cut are left out, and so are pairs with such a word.

    Args:
        frame: special tokens before and after.
        rng: draws the part that is cut from a longer text.
    """
    ids, spans = find_token_spans(tokenizer, related.text)
    if len(ids) > room:
        if rng is None:
            return None
        at = rng.randrange(len(ids) - room + 1)
        ids, spans = ids[at : at + room], spans[at : at + room]
    if not len(ids):
        return None
    begin, end = int(spans[0, 0]), int(spans[-1, 1])
    inside = [number for number, (a, b) in enumerate(related.words) if begin <= a and b <= end]
    units, of_words = assign_units([related.words[number] for number in inside], spans)
    unit = dict(zip(inside, of_words, strict=True))
    pairs = {}
    for relation, by_word in related.pairs.items():
        by_unit = [(unit.get(a), unit.get(b)) for a, b in by_word]
        whole = [pair for pair in by_unit if None not in pair and pair[0] != pair[1]]
        if whole:
            pairs[relation] = torch.tensor(whole)
    before, after = (np.asarray(list(part), dtype=np.int64) for part in frame)
    outside = np.full(len(before), -1), np.full(len(after), -1)
    return ProbeText(
        torch.from_numpy(np.concatenate([before, ids.astype(np.int64), after])),
        torch.from_numpy(np.concatenate([outside[0], units, outside[1]])),
        pairs,
    )
