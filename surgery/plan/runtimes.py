"""Find which runtimes serve a result, according to their source code.

The facts are in `runtimes.json`, one entry per runtime, each with the version and the date they
were read from:

- `architectures`: the class names it lists for text generation. vLLM runs a few of them through
  its Transformers backend; the llama.cpp names are those its converter to GGUF takes.
- `ignores_head_dim`: those of them for which it uses hidden_size / heads instead of the config's
  value, so that loading other shapes fails. `ignores_kv_heads`: the same for one KV head per head.
- `reads_windows`: those for which it takes the window's size from the config (`size`; which layers
  have it, it knows itself) or size and layers both (`layers`). Others have none in it. A runtime
  without this fact reads every window.
- `rope_types`: the rope types it reads for any of them. `rope_types_of` adds types that it reads
  for the named ones only.

A listed class is no guarantee: none of this has been run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "runtimes.json"
Facts = dict[str, Any]


def find_runtimes(
    architecture: str,
    *,
    native: bool,
    explicit_head_dim: bool = False,
    grouped: bool = False,
    rope_types: Collection[str] = (),
    windowed: bool = False,
    windows_moved: bool = False,
) -> dict[str, str]:
    """Find, for each runtime, why it does not serve the result; "" if it does.

    Args:
        architecture: class name of the exported model.
        native: the architecture's own format. Otherwise it is the record format, which only
            transformers reads, after `import surgery`.
        explicit_head_dim: the config's `head_dim` is not `hidden_size / heads`.
        grouped: there are fewer KV heads than query heads.
        rope_types: the rope types in the config; "default" is plain rope.
        windowed: some layers have a window that is shorter than the longest input.
        windows_moved: not the layers that have one in the original.
    """
    found = {"transformers": ""}
    for name, facts in read_runtimes().items():
        if not native:
            found[name] = "needs `import surgery`: the record format is read by transformers only"
        else:
            found[name] = find_obstacle(
                architecture, explicit_head_dim, grouped, rope_types, facts
            ) or find_window_obstacle(architecture, windowed, windows_moved, facts)
    return found


def find_obstacle(
    architecture: str, head_dim: bool, grouped: bool, rope_types: Collection[str], facts: Facts
) -> str:
    """Find why the runtime of these facts does not serve a native result; "" if it does."""
    source = f"({facts['title']} {facts['version']}, {facts['date']})"
    if architecture not in facts["architectures"]:
        return f"does not list {architecture} for text generation {source}"
    if head_dim and architecture in facts["ignores_head_dim"]:
        return f"uses hidden_size / heads as head_dim, not the config's value {source}"
    if grouped and architecture in facts["ignores_kv_heads"]:
        return f"assumes one KV head per query head for {architecture} {source}"
    special = facts.get("rope_types_of", {})
    unread = {t for t in rope_types if architecture not in special.get(t, ())}
    unread -= set(facts["rope_types"])
    if unread:
        return f"does not read rope type {', '.join(sorted(unread))} of {architecture} {source}"
    return ""


def find_window_obstacle(architecture: str, windowed: bool, moved: bool, facts: Facts) -> str:
    """Find why the runtime would compute other windows than the result's; "" if it does not."""
    reads = facts.get("reads_windows")
    if reads is None or architecture in reads["layers"]:
        return ""
    source = f"({facts['title']} {facts['version']}, {facts['date']})"
    if moved and architecture in reads["size"]:
        return f"knows itself which layers of {architecture} have a window {source}"
    if windowed and architecture not in reads["size"]:
        return f"does not read the window of {architecture} {source}"
    return ""


@cache
def read_runtimes() -> dict[str, Facts]:
    """Read `runtimes.json`: runtime → facts."""
    known: dict[str, Facts] = json.loads(files("surgery.plan").joinpath(FILE).read_text("utf-8"))
    return known
