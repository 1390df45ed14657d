"""What the figures do not say themselves, for the page: written by hand."""

from __future__ import annotations

# By the name of a results file: how it was measured.
NOTES: dict[str, str] = {
    "real-smollm2-cuda.json": (
        "Up to nine rows ran side by side on one GPU, two processor threads each, so times are "
        "upper bounds; those of the section on speed ran alone. The text is the standard library "
        "of Python 3.12."
    )
}
_SCORES = (
    "scored on 4 windows (gate_gradient: 16) before anything goes, heads that others could replace "
    "seem dear. Measured after the others made up for it (`elimination`), on two CPU cores with "
    "the library of Python 3.11, it is {}. All of these rows are older than attention sinks that "
    "count more in refits, and than layers that are fitted together"
)
# By the name of a model: why a result is not what was hoped for, by the name of a target or row.
REASONS: dict[str, dict[str, str]] = {
    "smollm2": {
        "merge-many": (
            "240 gradient steps do not suffice. Measured once by a script, on 32 other windows of "
            "512 tokens where mean pooling loses 8.162, the gap is 1.452 without steps, 0.475 "
            "after 120, 0.345 after 240 and 0.291 after 400 (`calibration.refine_steps`). On two "
            "CPU cores, with the library of Python 3.11, the row came to 0.063; and to 0.055 since "
            "attention sinks count more and layers are fitted together"
        ),
        "merge-few": (
            "attention sinks counted too little, and layers were not fitted together: with both, "
            "on two CPU cores with the library of Python 3.11, the row came to 0.139"
        ),
        "merge-average": (
            "the split over layers was chosen by the closed forms, before the steps. Chosen after "
            "a third of them, with attention sinks that count more and layers that are fitted "
            "together, on two CPU cores with the library of Python 3.11, the row loses 6.1% of the "
            "original's loss as cut instead of 9.2%. One KV head lost less, too, so it is 0.298 "
            "of that"
        ),
        "heal-one": (
            "the default rate is too high for this model: a tenth of 0.75 / width does better on "
            "59,392 tokens. And the text's own loss does better than distillation on 99,328"
        ),
        "heal-average": "as for one KV head",
        "prune-10": _SCORES.format("+1.9%"),
        "prune-20": _SCORES.format("+5.4%"),
        "prune-40": _SCORES.format("+14.3%"),
        "heal-prune": "the cut that it starts from is at +6.2%, and the rate as for one KV head",
    }
}
