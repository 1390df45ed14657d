"""What is measured at each moment of a run, as tables name and show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.units import format_bytes, format_count

MOMENT_NAMES = {
    "before": "before",
    "after_surgery": "after surgery",
    "after_training": "after healing",
}
# field → label, how it is shown
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("held-out loss (nats/token)", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "parameters": ("parameters", format_count),
    "kv_bytes_per_token": ("KV cache per token", format_bytes),
    "attention_flops": ("attention FLOPs", format_count),
    "prefill_ms": ("prefill (ms)", "{:.2f}".format),
    "decode_ms": ("decode (ms/token)", "{:.2f}".format),
}


def name_figure(field: str, summary: Mapping[str, Any]) -> str:
    """What tables of a run call a figure: FLOPs with the length that they are counted at."""
    tokens = (summary.get("planned") or {}).get("tokens")
    at = f", {tokens} tokens" if field == "attention_flops" and tokens else ""
    own = (summary.get("data") or {}).get("own_samples_held_out")
    on = " on samples of the original" if own and field == "loss" else ""
    return ROWS[field][0] + at + on
