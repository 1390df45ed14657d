"""The names under which a run logs its figures. Tests hold them against what runs really log.

The callbacks that log heads, the objectives and `surgery.lab.report.comparable` make these names;
this is where a dashboard, a document and a test look them up.
"""

from __future__ import annotations

STEP = "trainer/global_step"

LOSS = "train/loss"
HELD_OUT = "val/loss"
PARTS = ("train/kl", "train/label_loss", "train/attention")
OPEN_HEADS = "train/open_heads"

IMPORTANCE = "head_importance"
ENTROPY = "attention_entropy"
LOGIT = "max_logit"
# Of every query head; see docs/outputs.md for units.
STATISTICS = (
    ENTROPY,
    "normalized_entropy",
    LOGIT,
    "saturation",
    "confidence",
    "first_token",
    "previous_token",
    "own_token",
    "same_token",
    "induction",
    "distance",
    "output_norm",
)
HEADS = (IMPORTANCE, *STATISTICS)
# These alone are logged per layer: a chart for each would be too many.
PER_LAYER = {IMPORTANCE: ("mean", "min"), ENTROPY: ("mean", "min"), LOGIT: ("max",)}

ALARMS = ("collapse", "uniform", "logits", "dead")

# In the run's summary, once: what runs are compared by.
LOSSES = ("result/loss_before", "result/loss_after_surgery", "result/loss_after_training")
RESULT = (
    "result/loss",
    *LOSSES,
    "result/gap_closed",
    "result/parameters",
    "result/kv_bytes_per_token",
    "result/kv_bytes_share",
    "result/attention_flops",
    "result/prefill_ms",
    "result/decode_ms",
    "result/steps",
    "result/tokens",
    "result/alarms",
    "operations",
    "export",
)

# Once, where heads were scored, or several tasks compared.
SCORE_TABLE = "score_table"
SCORE_PICTURE = "head_scores"
TASKS_PICTURE = "tasks"


def over_heads(metric: str) -> str:
    """The one scalar over all heads: the mean, or the largest logit."""
    return f"{metric}/{'max' if metric == LOGIT else 'mean'}"


def heatmap(metric: str) -> str:
    """[layers × heads] picture."""
    return f"{metric}/heads"


def of_layer(metric: str, layer: int, what: str) -> str:
    """One scalar of one layer: `what` is one of ``PER_LAYER[metric]``."""
    return f"{metric}/layer_{layer:02d}/{what}"


def every_layer(metric: str, what: str) -> str:
    """A regular expression for the same scalar of all layers."""
    return f"^{metric}/layer_[0-9]+/{what}$"


def alarm(kind: str) -> str:
    return f"alarms/{kind}"


def charts(layers: int) -> int:
    """How many scalars a run of so many layers logs of its heads."""
    return len(HEADS) + layers * sum(map(len, PER_LAYER.values()))
