"""What healing came to, in sentences: for the terminal, the table, the report and the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from surgery.lab.report.summary import MOMENTS, NO_GAP, SURE


def describe_gap(summary: Mapping[str, Any]) -> str | None:
    """Say how much of the gap healing closed; the losses, where a share would say nothing."""
    if any(not summary.get(moment) for moment in MOMENTS) or not summary.get("operations"):
        return None
    before, opened, healed = (summary[moment]["loss"] for moment in MOMENTS)
    closed, noise = summary.get("gap_closed"), summary.get("gap_noise")
    if closed is not None:
        return f"healing closed {closed:.0%} of the gap in {summary['training']['steps']} steps"
    why = "no gap to close"
    if noise is not None and opened - before > NO_GAP:
        why = f"less than {SURE:g} standard errors ({SURE:g} x {noise:.4f}), so no share is given"
    return (
        f"surgery opened {opened - before:.4f} nats per token, {why}; loss {before:.4f} before, "
        f"{opened:.4f} after surgery, {healed:.4f} after healing"
    )


def describe_rate(value: float, share: float | None, reason: str) -> str:
    """Say what the peak learning rate was, and why.

    Args:
        share: of the full rate, 0.75 / hidden_size; ``None`` if it was not derived from that.
    """
    part = "" if share is None else f"{share:.2g} of 0.75 / hidden_size: "
    return f"learning rate {value:.3g}, {part}{reason}"


def describe_healing(training: Mapping[str, Any], *, exported: bool) -> Iterator[str]:
    """Say which weights training ended with, and what held-out losses it saw.

    Args:
        training: the part of a summary.
        exported: whether the run exports them.
    """
    are = "are exported" if exported else "are kept"
    reverted, found = training.get("reverted"), training.get("held_out")
    if reverted:
        worse = "no number" if reverted["loss"] is None else f"{reverted['loss']:.4f}"
        yield (
            f"healing did not help; the untrained weights {are}: on the measured windows their "
            f"loss is {reverted['untrained_loss']:.4f}, that of step {reverted['step']} {worse}"
        )
        return
    if not found:
        return
    best, kept = found["best_step"], found["kept_step"]
    last, last_loss = found["losses"][-1]
    every = found["every_n_steps"]
    looked = f"looked at {f'every {every} steps' if every else 'as trainer.* says'}"
    looked = f"{looked} on {found['windows']} windows"
    if best is None:
        yield f"no held-out loss was a number; the weights of step {kept} {are}, {looked}"
        return
    lowest = f"held-out loss {found['best_loss']:.4f} at step {best}"
    end = "no number" if last_loss is None else f"{last_loss:.4f}"
    is_last = (best, found["best_loss"]) == (last, last_loss)
    if found["kept"] == "last":
        yield f"the last weights {are}: held-out loss {end} at step {last}, {looked}"
        if not is_last:
            worse = "healing ended worse than it began; " if best == found["first_step"] else ""
            yield f"{worse}{lowest} was the lowest; validation.keep=best keeps such weights"
        return
    if is_last:
        yield f"the last weights {are}: {lowest} is the lowest, {looked}"
        return
    which = f"the weights of step {best} {are}"
    if best == 0:
        which = f"healing did not help; the untrained weights {are}"
    yield f"{which}: {lowest} is the lowest, {end} at the end (step {last}), {looked}"
