"""Losses window by window: their mean, and the noise of a difference."""

from __future__ import annotations

import math

import pytest
import torch

from surgery.config.schema import Task
from surgery.lab.report.summary import compute_gap_closed
from surgery.measure.loss import WindowLosses, compute_window_losses
from tests.families import family, tokens


def make_losses(sums: list[float], counts: list[float]) -> WindowLosses:
    return WindowLosses(torch.tensor(sums).double(), torch.tensor(counts).double())


def test_each_window_is_measured_as_if_it_were_alone() -> None:
    model, ids = family("llama").eval(), tokens(3, 10)
    labels = ids.clone()
    labels[1, 4:] = -100
    batch = {"input_ids": ids, "labels": labels}
    found = compute_window_losses(model, [batch], Task.causal_lm, total=1, label="all")
    assert found.counts.tolist() == [9, 3, 9]
    for row in range(3):
        with torch.no_grad():
            alone = model(input_ids=ids[row : row + 1], labels=labels[row : row + 1]).loss
        assert float(found.sums[row] / found.counts[row]) == pytest.approx(float(alone), rel=1e-5)
    assert found.mean == pytest.approx(float(found.sums.sum()) / 21)


def test_the_error_of_a_difference_is_that_of_paired_windows() -> None:
    """As many tokens in each: the standard error of a mean of differences."""
    draw = torch.Generator().manual_seed(0)
    shared = 100 * torch.rand(50, generator=draw).double()
    noise = torch.randn(50, generator=draw).double()
    counts = torch.full((50,), 20.0).double()
    one, other = WindowLosses(shared + noise, counts), WindowLosses(shared, counts)
    expected = float(noise.std()) / math.sqrt(50) / 20  # what both share is no noise
    assert one.compute_error(other) == pytest.approx(expected, rel=1e-9)


def test_the_error_holds_for_windows_of_unlike_length() -> None:
    """Against the spread of the difference over many draws of windows."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (2000, 60), generator=draw).double()
    sums = counts * 0.3 + counts.sqrt() * torch.randn(2000, 60, generator=draw).double()
    drawn = [WindowLosses(s, c) for s, c in zip(sums, counts, strict=True)]
    nothing = [WindowLosses(torch.zeros(60).double(), one.counts) for one in drawn]
    errors = [one.compute_error(none) for one, none in zip(drawn, nothing, strict=True)]
    spread = float(torch.tensor([one.mean for one in drawn]).std())
    assert sum(error for error in errors if error) / 2000 == pytest.approx(spread, rel=0.05)


def test_one_window_has_no_spread() -> None:
    assert make_losses([3.0], [2.0]).compute_error(make_losses([1.0], [2.0])) is None


@pytest.mark.parametrize(
    ("gap", "noise", "closed"),
    [(0.5, 0.1, 0.4), (0.5, None, 0.4), (0.5, 0.3, None), (0.001, 0.02, None), (5e-5, None, None)],
)
def test_a_gap_within_the_noise_has_no_share(
    gap: float, noise: float | None, closed: float | None
) -> None:
    losses = {"before": 1.0, "after_surgery": 1.0 + gap, "after_training": 1.0 + gap - 0.2}
    figures = {moment: {"loss": loss} for moment, loss in losses.items()}
    assert compute_gap_closed(figures, noise) == pytest.approx(closed)


def test_losses_by_position_are_those_of_the_same_labels() -> None:
    """Windows of unlike length in two batches, against a loop over single tokens."""
    model = family("llama").eval()
    batches = []
    for rows, length in ((2, 10), (1, 7)):
        ids = tokens(rows, length)
        labels = ids.clone()
        labels[0, 3] = -100
        batches.append({"input_ids": ids, "labels": labels})
    sums, counts = [0.0] * 10, [0] * 10
    for batch in batches:
        with torch.no_grad():
            log_p = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        for row, labels in enumerate(batch["labels"].tolist()):
            for position, label in enumerate(labels):
                if position and label != -100:
                    sums[position] -= float(log_p[row, position - 1, label])
                    counts[position] += 1
    found = compute_window_losses(model, map(dict, batches), Task.causal_lm, total=2, label="all")
    parts = found.split_by_position(5)
    assert parts is not None
    assert [part[:2] for part in parts] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for first, last, loss in parts:
        total = sum(sums[first : last + 1]) / sum(counts[first : last + 1])
        assert loss == pytest.approx(total, rel=1e-5)
    assert make_losses([1.0], [1.0]).split_by_position(5) is None


def test_a_loss_does_not_hang_on_how_many_tokens_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = family("llama").eval(), tokens(3, 10)
    batch = {"input_ids": ids, "labels": ids}
    found = []
    for size in (4096, 7):
        monkeypatch.setattr("surgery.measure.loss._AT_ONCE", size)
        found.append(compute_window_losses(model, [dict(batch)], Task.causal_lm, total=1, label=""))
    assert torch.equal(found[0].sums, found[1].sums)
