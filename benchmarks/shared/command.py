"""A benchmark's command line, as its results file names it."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def without(options: Collection[str], given: Sequence[str]) -> list[str]:
    """The words of `given` less those options and the value that follows each."""
    return [
        word
        for number, word in enumerate(given)
        if word not in options and not (number and given[number - 1] in options)
    ]
