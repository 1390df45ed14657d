"""A text with words and what hangs on what in it; from whichever source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Related:
    """A text, or a piece of one.

    Attributes:
        text: as a tokenizer is given it.
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


Texts = Sequence[Related]
