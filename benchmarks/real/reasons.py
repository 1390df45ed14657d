"""Why a result is not what was hoped for: by the name of a target, or of a row. For the page."""

from __future__ import annotations

_SCORES = (
    "the heads were scored on 4 windows, 2,044 tokens, for want of time; at 10% gate_gradient on "
    "16 windows removes better ones. Refits see 24 windows; what more gives is not measured"
)
REASONS: dict[str, str] = {
    "merge-many": (
        "gradient steps are what helps most, and 240 do not suffice. On 32 other windows of 512 "
        "tokens, where mean pooling loses 8.162, the same text left a gap of 1.452 without steps, "
        "0.475 after 120, 0.345 after 240 and 0.291 after 400. On two CPU cores, with the library "
        "of Python 3.11, the row came to 0.063 (calibrated in 13 min 41 s, with 2.5 GiB)"
    ),
    "merge-few": (
        "2,048 tokens do not suffice for more: most layers stop at 40 steps, since held-out text "
        "says so"
    ),
    "merge-average": (
        "the split over layers is chosen by the closed forms, before the steps, which help one KV "
        "head more than two: without steps one KV head is much further off"
    ),
    "heal-one": (
        "the default rate is too high for this model: a tenth of 0.75 / width does better on "
        "59,392 tokens, and the text's own loss better than distillation on 99,328"
    ),
    "heal-average": "as above",
    "prune-10": _SCORES,
    "prune-20": _SCORES,
    "prune-40": _SCORES,
    "heal-prune": "the cut that it starts from is too far off, as above",
}
