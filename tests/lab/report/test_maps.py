"""Figures of heads on the page: right as far as they go, and never too many."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.lab.report.html import write_report
from surgery.lab.report.html.maps import choose_precision, encode_metric, pack_maps, read_maps
from surgery.lab.report.html.report import LIMIT
from tests.lab.report.making import (
    METRICS,
    write_analysis,
    write_heads,
    write_importance,
    write_run,
)

LARGE = 10**9


def decoded(metric: dict[str, Any]) -> np.ndarray:
    """What the page reads off the codes, by the formula in the docstring of `encode_metric`."""
    raw = base64.b64decode(metric["codes"])
    codes = np.frombuffer(raw, "<u2" if metric["bits"] == 16 else "u1").astype(float)
    highest = 2 ** metric["bits"] - 2
    share = np.where(codes > highest, np.nan, codes / highest)
    low, high, width = metric["low"], metric["high"], metric["width"]
    if not width:
        return low + share * (high - low)
    bottom, top = np.arcsinh(low / width), np.arcsinh(high / width)
    return width * np.sinh(bottom + share * (top - bottom))


@given(
    arrays(np.float64, (2, 3, 4), elements=st.floats(-1e6, 1e6, width=32) | st.just(np.nan)),
    st.sampled_from([8, 16]),
)
def test_codes_are_half_a_step_off_at_most(values: np.ndarray, bits: int) -> None:
    if not np.isfinite(values).any():
        return
    metric = encode_metric("x", values, bits)
    found = decoded(metric).reshape(values.shape)
    assert np.array_equal(np.isnan(found), np.isnan(values))
    known = np.isfinite(values)
    width = metric["width"]
    scaled = [np.arcsinh(x[known] / width) if width else x[known] for x in (values, found)]
    half_step = np.ptp(scaled[0]) / (2**bits - 2) / 2
    assert np.abs(scaled[0] - scaled[1]).max() <= half_step * 1.01 + 1e-9 * np.abs(scaled[0]).max()


def test_few_observations_are_all_kept(tmp_path: Path) -> None:
    steps = [0, 5, 10, 15]
    drawn = write_heads(tmp_path, steps, 3, 4)
    found = read_maps(tmp_path / "heads.parquet", LARGE)
    assert found is not None
    assert [metric["name"] for metric in found["metrics"]] == list(METRICS)
    for metric in found["metrics"]:
        importance = metric["name"] == "head_importance"
        assert metric["steps"] == ([0, 10] if importance else steps)
        expected = drawn[metric["name"]][:: 2 if importance else 1]
        relative = np.abs(decoded(metric).reshape(expected.shape) / expected - 1)
        assert np.median(relative) < 1e-4


def test_heads_that_are_not_there_stay_empty() -> None:
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    found = pack_maps("t", places, {"x": [1.0, 2.0, 3.0, 4.0, None, 5.0]}, LARGE)
    assert found is not None
    expected = [1, 2, 3, 4, np.nan, np.nan, np.nan, 5, np.nan]
    assert np.allclose(decoded(found["metrics"][0]), expected, equal_nan=True, atol=1e-3)


@given(st.integers(1, 5000), st.integers(1, 20_000), st.integers(0, 3_000_000))
def test_precision_fits_the_room(steps: int, heads: int, room: int) -> None:
    bits, kept = choose_precision(steps, heads, room)
    assert 1 <= kept <= steps
    assert kept * heads * bits // 8 <= max(room, heads)


def test_a_long_run_of_a_large_model_fits(tmp_path: Path) -> None:
    """32 layers of 32 heads, 13 metrics, 2,000 observed steps: 26 million figures."""
    steps = list(range(0, 10_000, 5))
    columns = METRICS[:2]  # drawn anew; the others are the same again, under their own names
    write_run(tmp_path)
    drawn = _repeat(write_heads(tmp_path, steps, 32, 32, columns), tmp_path)
    write_importance(tmp_path, 32, 32)
    write_analysis(tmp_path, 32, 32)
    path = write_report(tmp_path)
    assert 1_000_000 < path.stat().st_size <= LIMIT
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    observed = next(part for part in data["maps"] if part["title"] == "while training")
    assert len(observed["metrics"]) == len(METRICS)
    entropy = observed["metrics"][1]
    assert entropy["observed"] == len(steps)
    assert entropy["steps"][0] == steps[0]
    assert entropy["steps"][-1] == steps[-1]
    gaps = np.diff(entropy["steps"])
    assert gaps.max() - gaps.min() <= 5  # evenly spread, to the nearest observed step
    kept = drawn["attention_entropy"][[steps.index(step) for step in entropy["steps"]]]
    off = np.abs(decoded(entropy).reshape(kept.shape) - kept).max()
    assert off <= 1 / 254 / 2 * 1.01  # of values in 0..1, in 8 bits


def _repeat(drawn: dict[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "heads.parquet")
    for name in METRICS[len(drawn) :]:
        table = table.append_column(name, table[METRICS[1]])
    pq.write_table(table, directory / "heads.parquet")
    return drawn


@pytest.mark.parametrize("limit", [400_000, 900_000])
def test_a_tighter_limit_is_kept_too(limit: int, tmp_path: Path) -> None:
    from surgery.lab.report.html.data import read_run
    from surgery.lab.report.html.report import render_report

    write_run(tmp_path)
    write_heads(tmp_path, list(range(100)), 16, 16)
    text = render_report(read_run(tmp_path), limit)
    assert limit / 2 < len(text.encode()) <= limit
