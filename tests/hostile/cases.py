"""One generator of damaged and hostile input: valid input of every kind, changed at random.

A case is small and says all that was done, so that it can be shown, shrunk and tried again.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.hostile.bases import FAMILIES, PLANNED, RECORDED

# More levels than any parser that recurses can take.
DEEP = 20_000
_NUMBERS = (-1, 0, 1, 2, 3, 7, 10**5, 10**9, 2**63, 10**30, 0.5, -0.0, 2.0, 1e308, 1e-320)
_TEXTS = (
    "",
    "x",
    "0",
    "true",
    "../x",
    "/etc/passwd",
    "pytorch_model.bin",
    "decoy.safetensors",
    "missing.safetensors",
    "forward",
    "config",
    "layer_idx",
    "_forward_hooks",
    "__class__",
    "attention_surgery",
    "os.system",
    "\x00",
    "\ud800",
    "é" * 300,
    "model.layers.0.self_attn",
    "~nobody/x",
    "${nope}",
    "model.layers.1",
    "1" * 5000,
    "backend",
    "fuse_qkv",
    "flash_attention_2",
)
_SPECIAL = (math.nan, math.inf, -math.inf)


def make_values(keep: Callable[[Any], bool] = lambda _: True) -> st.SearchStrategy[Any]:
    """Values that somebody may put where another one belongs."""
    single = st.sampled_from([None, True, False, *_NUMBERS, *_TEXTS, *_SPECIAL]).filter(keep)
    return st.one_of(
        single,
        single,
        st.lists(single, max_size=3),
        st.dictionaries(st.sampled_from([t for t in _TEXTS if keep(t)]), single, max_size=2),
    )


@dataclass(frozen=True)
class Change:
    """A change of nested data: at the n-th place (of all, counted again from the start)."""

    place: int
    how: str
    value: Any = None


_HOW = ("replace", "replace", "replace", "delete", "add", "rename", "wrap", "repeat")


def make_changes() -> st.SearchStrategy[list[Change]]:
    change = st.builds(Change, st.integers(0, 10**6), st.sampled_from(_HOW), make_values())
    return st.lists(change, min_size=1, max_size=3)


def change_data(data: Any, changes: list[Change]) -> Any:
    """Do the changes on a copy of nested data."""
    holder = {"": copy.deepcopy(data)}
    for change in changes:
        places = list(_list_places(holder))
        if places:
            _change(*places[change.place % len(places)], change)
    return holder.get("")


def _list_places(data: Any) -> Iterator[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield data, key
        if isinstance(value, (dict, list)):
            yield from _list_places(value)


def _change(holder: Any, key: Any, change: Change) -> None:
    old, value = holder[key], copy.deepcopy(change.value)
    name = value if isinstance(value, str) else "new"
    if change.how == "replace":
        holder[key] = value
    elif change.how == "delete" and key != "":
        del holder[key]
    elif change.how == "add":
        if isinstance(old, dict):
            old[name] = value
        elif isinstance(old, list):
            old.append(value)
    elif change.how == "rename" and isinstance(holder, dict) and key != "":
        holder[name] = holder.pop(key)
    elif change.how == "wrap":
        holder[key] = [old]
    elif change.how == "repeat" and isinstance(old, (list, str)):
        holder[key] = old * 3


@dataclass(frozen=True)
class Damage:
    """A change of bytes, at a share of their length: cut there, one flipped, or some put in."""

    share: float
    how: str
    put: int = 0  # number of what is put in


_PUT = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\x1f\x8b\x08garbage",
    b"PAR1",
    b'"',
    b"[",
    b"{" * 300,
    b'{"a":' * DEEP,
    b"[" * DEEP,
    b"\xc3\x28",
    b"\n",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 5000,
)


_SHARES = (0.0, 0.01, 0.1, 0.5, 0.99, 1.0)
# The header of a tiny GGUF is its first 2%.
_HEADER_SHARES = (*_SHARES, *(number / 1e5 for number in range(1, 1500, 7)))


def make_damage(shares: Sequence[float] = _SHARES) -> st.SearchStrategy[list[Damage]]:
    return st.lists(
        st.builds(
            Damage,
            st.sampled_from(shares),
            st.sampled_from(["cut", "flip", "put", "put"]),
            st.integers(0, len(_PUT) - 1),
        ),
        min_size=1,
        max_size=2,
    )


def damage_bytes(content: bytes, damages: list[Damage]) -> bytes:
    for damage in damages:
        at = int(damage.share * len(content))
        if damage.how == "cut":
            content = content[:at]
        elif damage.how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        elif damage.how == "put":
            content = content[:at] + _PUT[damage.put] + content[at:]
    return content


def dump(data: Any) -> str:
    """Write JSON as Python's own reader takes it, NaN and lone surrogates too."""
    return json.dumps(data)


@dataclass(frozen=True)
class Case:
    """One input: its kind, which valid input it is made of, and what is changed in that."""

    kind: str
    base: str
    changes: Any


_FIELDS = (
    "num_hidden_layers",
    "num_labels",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attention_dropout",
    "n_layer",
    "rope_theta",
    "rope_parameters",
    "layer_types",
    "intermediate_size",
    "id2label",
    "auto_map",
    "transformers_weights",
    "quantization_config",
    "model_type",
    "architectures",
    "sliding_window",
    "dtype",
    "pad_token_id",
    "num_experts",
    "tie_word_embeddings",
    "per_layer_config",
    "rms_norm_eps",
)
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors")
_ROW_FILES = ("rows.jsonl", "rows.json", "rows.txt", "rows.parquet")


def make_cases() -> st.SearchStrategy[Case]:
    """Every kind of input, each about as often as it costs time to try."""
    fields = st.dictionaries(st.sampled_from(_FIELDS), make_values(), min_size=1, max_size=2)
    kinds = {
        "config": st.builds(
            Case, st.just("config"), st.sampled_from(FAMILIES), st.one_of(make_changes(), fields)
        ),
        "file": st.builds(
            Case,
            st.just("file"),
            st.sampled_from(FAMILIES),
            st.tuples(st.sampled_from(_FILES), make_damage()),
        ),
        "index": st.builds(
            Case, st.just("index"), st.just("sharded"), st.one_of(make_changes(), make_damage())
        ),
        "gguf": st.builds(Case, st.just("gguf"), st.just("tiny"), make_damage(_HEADER_SHARES)),
        "pickled": st.builds(Case, st.just("pickled"), st.just("llama"), make_damage()),
        "record": st.builds(
            Case, st.just("record"), st.sampled_from(sorted(RECORDED)), make_changes()
        ),
        "plan": st.builds(Case, st.just("plan"), st.sampled_from(sorted(PLANNED)), make_changes()),
        "scores": st.builds(
            Case,
            st.just("scores"),
            st.sampled_from(["json", "parquet"]),
            st.one_of(make_changes(), make_damage()),
        ),
        "rows": st.builds(
            Case,
            st.just("rows"),
            st.sampled_from(_ROW_FILES),
            st.one_of(make_changes(), make_damage()),
        ),
        "overrides": st.builds(
            Case,
            st.just("overrides"),
            st.just("run"),
            st.lists(
                st.tuples(st.integers(0, 10**6), make_values()),
                min_size=1,
                max_size=2,
            ),
        ),
        "line": st.builds(
            Case, st.just("line"), st.just("run"), st.tuples(st.integers(0, 10**6), make_text())
        ),
    }
    often = ["config", "record", "record", "plan", "plan", "scores", "overrides", "overrides"]
    return st.sampled_from([*kinds, *often]).flatmap(lambda kind: kinds[kind])


def make_text() -> st.SearchStrategy[str]:
    """What may stand behind `key=` on a command line."""
    return st.one_of(
        st.sampled_from(
            ["[" * 500, "{a:" * 500, "'", "${", "${oc.env:HOME}", "a=b", "[1,", "null"]
        ),
        st.text(st.sampled_from("[]{}'\",:=$ ax1-.~\\"), max_size=12),
        make_values(lambda value: not isinstance(value, float)).map(str),
    )
