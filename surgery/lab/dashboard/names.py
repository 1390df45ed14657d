"""The names of the figures that a run logs. Tests compare them with what runs really log.

The callbacks that log heads, the objectives and `surgery.lab.report.comparable` log under these
names; a dashboard, a document and a test look them up here.
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
# Statistics of every query head; see docs/outputs.md for units.
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
# Only these are logged per layer: a chart for every statistic would be too many.
PER_LAYER = {IMPORTANCE: ("mean", "min"), ENTROPY: ("mean", "min"), LOGIT: ("max",)}

ALARMS = ("collapse", "uniform", "logits", "dead")

# Once in the run's summary, to compare runs.
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

# Once, if heads were scored or several tasks compared.
SCORE_TABLE = "score_table"
SCORE_PICTURE = "head_scores"
TASKS_PICTURE = "tasks"


def name_over_heads(metric: str) -> str:
    """Name the scalar over all heads: the mean, or the largest logit."""
    return f"{metric}/{'max' if metric == LOGIT else 'mean'}"


def name_heatmap(metric: str) -> str:
    """Name the [layers × heads] picture."""
    return f"{metric}/heads"


def name_of_layer(metric: str, layer: int, what: str) -> str:
    """Name a scalar of one layer: `what` is one of ``PER_LAYER[metric]``."""
    return f"{metric}/layer_{layer:02d}/{what}"


def make_layer_pattern(metric: str, what: str) -> str:
    """Make a regular expression for the same scalar of all layers."""
    return f"^{metric}/layer_[0-9]+/{what}$"


def name_alarm(kind: str) -> str:
    return f"alarms/{kind}"


def count_charts(layers: int) -> int:
    """Count the scalars of heads that a run with this number of layers logs."""
    return len(HEADS) + layers * sum(map(len, PER_LAYER.values()))
