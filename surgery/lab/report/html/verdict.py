"""The first thing on the page: what was saved, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.lab.report.figures import MOMENT_NAMES, ROWS
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.markup import Markup, bar, tag
from surgery.lab.report.html.quantities import change, signed
from surgery.lab.report.summary import MOMENTS

# Nats per token that no one would notice.
_NOTHING = 0.0005
_FIELDS = ("kv_bytes_per_token", "parameters", "attention_flops", "decode_ms")
_CARDS = {
    "kv_bytes_per_token": "KV cache per token",
    "parameters": "parameters",
    "attention_flops": "attention FLOPs",
    "decode_ms": "decoding, ms per token",
}


def headline(run: RunFiles) -> str:
    """One sentence: savings, and what they cost in held-out loss."""
    before, after = ends(run)
    saved = _saved(before, after)
    if not run.operations:
        if before and after and "loss" in before and "loss" in after:
            cost = signed(after["loss"] - before["loss"])
            return f"Trained without surgery: {cost} nats per token on held-out text"
        return "Nothing was changed: the model was looked at"
    if "loss" not in before or "loss" not in after:
        return f"{saved or 'Nothing gets smaller'}: planned, not measured"
    cost = after["loss"] - before["loss"]
    when = "after healing" if run.summary.get("after_training") else "before any healing"
    price = f"for {signed(cost)} nats per token {when}"
    if abs(cost) < _NOTHING:
        price = f"and the same held-out loss {when}"
    elif cost < 0:
        price = f"and {signed(cost)} nats per token {when}"
    return f"{saved or 'Sizes stay the same'}, {price}"


def ends(run: RunFiles) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The figures to compare: measured where they were, planned sizes where not."""
    summary = run.summary
    planned = summary.get("planned") or {}
    before = summary.get("before") or planned.get("before") or run.plan.get("sizes_before") or {}
    measured = summary.get("after_training") or summary.get("after_surgery")
    after = measured or planned.get("after") or run.plan.get("sizes_after") or {}
    return before, after


def explanation(run: RunFiles) -> str:
    """A sentence or two on what happened in between."""
    summary, parts = run.summary, []
    losses = {m: summary[m]["loss"] for m in MOMENTS if summary.get(m)}
    closed, training = summary.get("gap_closed"), summary.get("training") or {}
    if "before" in losses and "after_surgery" in losses:
        gap = losses["after_surgery"] - losses["before"]
        if abs(gap) < _NOTHING:
            parts.append("Surgery changed nothing in what the model computes.")
        elif closed is not None:
            healed = f"closed {closed:.0%} of it" if closed >= 0 else f"widened it by {-closed:.0%}"
            parts.append(
                f"Surgery opened a gap of {gap:.3f} nats per token; {training.get('steps')} steps "
                f"of healing {healed}."
            )
        else:
            parts.append(f"Surgery opened a gap of {gap:.3f} nats per token.")
    export = summary.get("export") or {}
    if export:
        parts.append(f"The export is {_FORMATS[export['format']]}{_served(export['runtimes'])}.")
    return " ".join(parts)


def _served(runtimes: Sequence[str]) -> str:
    """Who loads it: transformers did, of the others it is what their sources say."""
    others = [name for name in runtimes if name != "transformers"]
    listed = f"{' and '.join(others)} list{'' if len(others) > 1 else 's'} it (not run here)"
    own = "transformers loads it" if "transformers" in runtimes else ""
    said = [one for one in (own, listed if others else "") if one]
    return f"; {', '.join(said)}" if said else ""


_FORMATS = {
    "native": "in the architecture's own format",
    "converted": "in the format of another architecture",
    "record": "in transformers' format with a record",
}


def cards(run: RunFiles) -> Markup | None:
    """The savings, big."""
    before, after = ends(run)
    found = []
    for field in _FIELDS:
        old, new = before.get(field), after.get(field)
        if new is None:
            continue
        label, shown = _CARDS[field], ROWS[field][1]
        lines = [tag("dt", label), tag("dd", shown(new), class_="value")]
        if old is not None and run.operations:
            moved = tag("b", change(old, new), class_="change")
            lines.append(tag("dd", "was ", shown(old), " ", moved, class_="was"))
        found.append(tag("div", lines, class_="card"))
    return tag("dl", found, class_="cards") if found else None


def losses(run: RunFiles) -> Markup | None:
    """Held-out loss at each moment, with a bar for what it lies above the original."""
    summary = run.summary
    levels = {m: summary[m]["loss"] for m in MOMENTS if summary.get(m)}
    if not levels:
        return None
    start = next(iter(levels.values()))
    most = max((loss - start for loss in levels.values()), default=0.0)
    rows = []
    for moment, loss in levels.items():
        above = loss - start
        name = MOMENT_NAMES[moment] if run.operations else moment.replace("_", " ")
        drawn = bar(above / most if most > 0 else 0.0, moment)
        figures = [tag("td", f"{loss:.4f}", class_="number"), tag("td", drawn)]
        said = "" if moment == "before" else signed(above)
        rows.append(
            tag("tr", tag("th", name, scope="row"), figures, tag("td", said, class_="number"))
        )
    caption = tag(
        "caption",
        "Held-out loss, nats per token; the bar is what it lies above the ",
        "original" if "before" in levels else "first",
    )
    return tag("table", caption, tag("tbody", rows), class_="losses")


def _saved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    parts = []
    names = {"kv_bytes_per_token": "KV cache", "parameters": "parameters"}
    for field, name in names.items():
        moved = change(before.get(field), after.get(field))
        if moved not in ("", "same"):
            parts.append(f"{name} {moved}")
    if not parts:
        moved = change(before.get("attention_flops"), after.get("attention_flops"))
        if moved not in ("", "same"):
            parts.append(f"attention FLOPs {moved}")
    return ", ".join(parts)
