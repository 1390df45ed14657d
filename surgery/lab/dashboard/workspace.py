"""The workspace: a few panels, each for all layers or all runs.

A model with 32 layers of 32 heads has a thousand heads. They are in heatmaps and tables; the
number of charts here grows with the metrics, not with heads or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from surgery.lab.dashboard import names

NAME = "Attention surgery"
TITLES = {
    names.IMPORTANCE: "Head importance (nats)",
    names.ENTROPY: "Attention entropy (nats)",
    names.LOGIT: "Largest attention logit",
    "normalized_entropy": "Entropy / log(visible keys)",
    "saturation": "Saturated rows",
    "confidence": "Largest attention weight",
    "first_token": "Mass on the first token",
    "previous_token": "Mass on the previous token",
    "own_token": "Mass on the token itself",
    "same_token": "Mass on equal tokens",
    "induction": "Mass on induction targets",
    "distance": "Mean distance (tokens)",
    "output_norm": "Norm of the head's output",
}
ALARMS = {
    "collapse": "Entropy collapse",
    "uniform": "Entropy near uniform",
    "logits": "Logit explosion",
    "dead": "Dead heads",
}


def build_workspace(entity: str, project: str, name: str = NAME) -> ws.Workspace:
    """Build the workspace without a network; its `save()` needs a login."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            _build_result(),
            _build_training(),
            _build_alarms(),
            _build_attention(),
            _build_patterns(),
            _build_importance(),
            _build_heads(),
        ],
        settings=ws.WorkspaceSettings(x_axis=names.STEP, max_runs=20),
        # W&B would add a panel per logged scalar.
        auto_generate_panels=False,
    )


def _build_result() -> ws.Section:
    size, loss = "result/kv_bytes_per_token", "result/loss"
    columns = ["result/parameters", size, "result/loss_after_surgery", loss, "result/decode_ms"]
    return _make_section(
        "Result",
        wr.BarPlot(
            title="Loss before, after surgery, after healing (nats per token)",
            metrics=list(names.LOSSES),
        ),
        wr.ScatterPlot(
            title="What a smaller cache costs", x=wr.SummaryMetric(size), y=wr.SummaryMetric(loss)
        ),
        wr.BarPlot(title="Share of the gap that healing closed", metrics=["result/gap_closed"]),
        wr.ParallelCoordinatesPlot(
            title="Runs of a sweep",
            columns=[wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(one)) for one in columns],
        ),
        wr.ParameterImportancePlot(with_respect_to=loss),
        wr.RunComparer(diff_only=True),
        is_open=True,
    )


def _build_training() -> ws.Section:
    return _make_section(
        "Training",
        _make_line("Objective", [names.LOSS]),
        _make_line("Label loss on held-out windows", [names.HELD_OUT]),
        _make_line("Its parts, when distilling", names.PARTS),
        _make_line("Open heads (mean gate)", [names.OPEN_HEADS]),
        _make_regex_line("Learning rate", "^lr-"),
        is_open=True,
    )


def _build_alarms() -> ws.Section:
    return _make_section(
        "Alarms", *(_make_line(title, [names.name_alarm(kind)]) for kind, title in ALARMS.items())
    )


def _build_attention() -> ws.Section:
    panels = [
        _make_regex_line(
            f"{TITLES[metric]}, {what} of each layer", names.make_layer_pattern(metric, what)
        )
        for metric in (names.ENTROPY, names.LOGIT)
        for what in names.PER_LAYER[metric]
    ]
    over_all = [names.ENTROPY, "normalized_entropy", names.LOGIT, "saturation", "confidence"]
    return _make_section(
        "Heads: entropy and logits", *panels, *map(_make_line_over_heads, over_all)
    )


def _build_patterns() -> ws.Section:
    shown = [
        "first_token",
        "previous_token",
        "own_token",
        "same_token",
        "induction",
        "distance",
        "output_norm",
    ]
    return _make_section("Heads: where they look", *map(_make_line_over_heads, shown))


def _build_importance() -> ws.Section:
    metric = names.IMPORTANCE
    layers = [
        _make_regex_line(
            f"{TITLES[metric]}, {what} of each layer", names.make_layer_pattern(metric, what)
        )
        for what in names.PER_LAYER[metric]
    ]
    return _make_section("Importance", _make_line_over_heads(metric), *layers)


def _build_heads() -> ws.Section:
    maps = [
        wr.MediaBrowser(
            title=TITLES[metric],
            media_keys=[names.name_heatmap(metric)],
            num_columns=1,
            gallery_axis="step",
        )
        for metric in names.HEADS
    ]
    bars = wr.CustomChart(
        query={"summaryTable": {"tableKey": names.SCORE_TABLE}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": "layer", "y": "score"},
        chart_strings={"title": "Head scores by layer"},
    )
    once = [names.SCORE_PICTURE, names.TASKS_PICTURE]
    return _make_section(
        "Tables and heatmaps",
        *maps,
        wr.MediaBrowser(title="Head scores, tasks", media_keys=once, num_columns=1),
        bars,
        wr.WeavePanelSummaryTable(table_name=names.SCORE_TABLE),
    )


def _make_section(name: str, *panels: Any, is_open: bool = False) -> ws.Section:
    return ws.Section(name=name, panels=list(panels), is_open=is_open)


def _make_line(title: str, metrics: Sequence[str]) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=names.STEP, y=list(metrics))


def _make_line_over_heads(metric: str) -> wr.LinePlot:
    what = "of all heads" if metric == names.LOGIT else "mean over heads"
    return _make_line(f"{TITLES[metric]}, {what}", [names.name_over_heads(metric)])


def _make_regex_line(title: str, pattern: str) -> wr.LinePlot:
    """Make one panel with a line for each scalar that matches."""
    return wr.LinePlot(title=title, x=names.STEP, metric_regex=pattern)
