"""Comments of YAML files are written from the fields, and nothing else in a file changes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import yaml

from surgery.config.comments import Key, describe_keys, rewrite_comments, write_yaml
from surgery.config.options import COUNT, SHARE, Range, option


class Shape(Enum):
    round = "round"
    square = "square"


@dataclass
class Hole:
    depth: float = option(1e-3, "how deep", range=SHARE)


@dataclass
class Peg:
    size: int = option(help="in inches", range=Range(low=2))
    count: int = option(1, "how many", range=COUNT)
    shape: Shape = option(Shape.square)
    fit: Shape = option(Shape.round, "of the hole")
    told: Shape = option(Shape.round, "round: as it is | square: cut")
    hole: Hole = option(default_factory=Hole, help="Where it goes.")
    names: list[str] = option(default_factory=lambda: ["a: b", "c"], help="of pegs; null for none")
    far: str | None = option(None, "word " * 15 + "word")
    too_far: str | None = option(None, "word " * 25 + "end")
    plain: int = 3


WRITTEN = f"""\
# A peg for a hole.
peg:
  size: ???              # in inches; at least 2
  count: 1               # how many
  shape: square          # round | square
  fit: round             # round | square; of the hole
  told: round            # round: as it is | square: cut
  # Where it goes.
  hole:
    depth: 0.001         # how deep; in [0, 1]
  names: ['a: b', c]     # of pegs; null for none
  far: null  # {"word " * 15}word
  # {("word " * 19).strip()}
  # {"word " * 6}end
  too_far: null
  plain: 3
"""


def test_a_file_is_written_from_a_dataclass() -> None:
    text = write_yaml(Peg, "peg", "A peg for a hole.")
    assert text == WRITTEN
    assert max(map(len, text.splitlines())) <= 100
    assert yaml.safe_load(text) == {
        "peg": {
            "size": "???",
            "count": 1,
            "shape": "square",
            "fit": "round",
            "told": "round",
            "hole": {"depth": 0.001},
            "names": ["a: b", "c"],
            "far": None,
            "too_far": None,
            "plain": 3,
        }
    }


def test_what_was_written_stays_when_it_is_rewritten() -> None:
    assert rewrite_comments(WRITTEN, {"peg": Key(keys=describe_keys(Peg))}) == WRITTEN


def test_a_long_head_is_wrapped() -> None:
    lines = write_yaml(Hole, "hole", "word " * 40).splitlines()
    assert [line.startswith("# ") for line in lines] == [True, True, True, False, False]
    assert all(len(line) <= 100 for line in lines)


KEYS = {
    "a": Key("one"),
    "flow": Key("a mapping"),
    "block": Key("other people's keys"),
    "text": Key("several lines"),
    "section": Key("A section.", {"x": Key("inside"), "y": Key()}),
    "empty": Key("nothing there"),
}

OLD = """\
# The head of the file,
# two lines of it.
a: 'x # y'   # an older comment
own: 1  # of a key that nobody knows
# an older section
section:
  # kept, too
  y: ${oc.env:HOME}  # kept, where nothing is known
  # older
  x: 1.0e-3  # older

flow: {b: [1, 2], "c": "#"}
block:
  # kept
  d: 1  # kept
text: >
  several
  lines
# kept: it stands at no key

empty:
# the end
"""

NEW = """\
# The head of the file,
# two lines of it.
a: 'x # y'                   # one
own: 1  # of a key that nobody knows
# A section.
section:
  # kept, too
  y: ${oc.env:HOME}  # kept, where nothing is known
  x: 1.0e-3              # inside

flow: {b: [1, 2], "c": "#"}  # a mapping
block:                       # other people's keys
  # kept
  d: 1  # kept
# several lines
text: >
  several
  lines
# kept: it stands at no key

empty:                       # nothing there
# the end
"""


def test_values_order_and_strange_keys_stay() -> None:
    assert rewrite_comments(OLD, KEYS) == NEW
    assert yaml.safe_load(OLD) == yaml.safe_load(NEW)


def test_it_is_done_at_once() -> None:
    once = rewrite_comments(OLD, KEYS)
    assert rewrite_comments(once, KEYS) == once


def test_a_comment_above_the_first_key_is_not_the_head() -> None:
    keys = {"a": Key("word " * 30)}
    for old in ("# head\na: 1\n", "a: 1\n"):
        once = rewrite_comments(old, keys)
        assert rewrite_comments(once, keys) == once
        assert once.count("word") == 30
        assert once.removeprefix("# head\n").startswith("\n# word")


@pytest.mark.parametrize("value", ["null", "{x: 1}"])
def test_a_section_may_be_a_value(value: str) -> None:
    assert rewrite_comments(f"section: {value}\n", KEYS).startswith(f"section: {value} ")


def test_a_file_without_keys_stays() -> None:
    for text in ("# nothing\n", "- a  # b\n"):
        assert rewrite_comments(text, KEYS) == text


def test_keys_of_a_dataclass_are_in_order() -> None:
    keys: Any = describe_keys(Peg)
    assert list(keys)[:3] == ["size", "count", "shape"]
    assert keys["hole"].keys == {"depth": Key("how deep; in [0, 1]")}
    assert keys["plain"] == Key("")
