"""What the figures of a head are called, and their units."""

from __future__ import annotations

from typing import Any

_KNOWN = {
    "head_importance": ("importance", "", "how much the loss hangs on the head's gate"),
    "attention_entropy": ("entropy", "nats", "of the attention weights, mean over query rows"),
    "normalized_entropy": ("entropy, normalised", "", "as a share of what uniform attention has"),
    "max_logit": ("largest logit", "", "scaled and masked, before the softmax"),
    "saturation": ("saturation", "", "of the softmax"),
    "confidence": ("confidence", "", "largest weight of a row, mean over query rows"),
    "first_token": ("mass on the first token", "", "share of attention"),
    "previous_token": ("mass on the previous token", "", "share of attention"),
    "own_token": ("mass on the token itself", "", "share of attention"),
    "same_token": ("mass on equal tokens", "", "share of attention"),
    "induction": ("mass on the induction target", "", "share of attention"),
    "distance": ("distance", "tokens", "mean distance attended over"),
    "output_norm": ("output norm", "", "of the head's part of the output projection's input"),
    "contribution_norm": ("contribution", "", "norm of what the head adds to the residual stream"),
    "redundancy": ("redundancy", "", "share of its output that the layer's other heads could say"),
}


def described(name: str) -> dict[str, Any]:
    """Name, label, unit and a note of a metric; the name itself where it is not known."""
    label, unit, note = _KNOWN.get(name, (name.replace("_", " "), "", ""))
    return {"name": name, "label": label, "unit": unit, "note": note}
