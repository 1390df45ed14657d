"""What to know before shipping: alarms, what cannot load the export, what was not checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.markup import Markup, join, tag
from surgery.lab.report.html.quantities import signed

ALARM, CAUTION, NOTE = "alarm", "caution", "note"
_SIGNS = {ALARM: "\N{BLACK UP-POINTING TRIANGLE}", CAUTION: "!", NOTE: "i"}
_ALARMS = {
    "collapse": "Entropy collapsed in {}",
    "uniform": "Attention was near uniform in {}",
    "logits": "Logits exploded in {}",
    "dead": "No output was left of {}",
}
# Heads named per alarm; the map shows all.
_NAMED = 6


@dataclass(frozen=True)
class Remark:
    """One thing to know.

    Attributes:
        kind: ``alarm`` (a head went wrong), ``caution`` (look at it first) or ``note``.
        text: what.
        detail: more of it.
    """

    kind: str
    text: str
    detail: str = ""


def remarks(run: RunFiles, undrawn: Sequence[str] = ()) -> list[Remark]:
    """All of them, the gravest first.

    Args:
        undrawn: a sentence for whatever the page has no picture of.
    """
    found = [
        *_alarms(run),
        *_losses(run),
        *_sizes(run),
        *_export(run),
        *_tasks(run),
        *_plan(run),
        *(Remark(CAUTION, problem) for problem in (*run.problems, *undrawn)),
    ]
    return sorted(found, key=lambda remark: (ALARM, CAUTION, NOTE).index(remark.kind))


def remarks_list(found: list[Remark]) -> Markup | None:
    if not found:
        return None
    lines = []
    for remark in found:
        sign = tag("span", _SIGNS[remark.kind], class_="sign", aria_hidden="true")
        name = tag("span", f"{remark.kind}: ", class_="unseen")
        detail = tag("span", remark.detail, class_="detail") if remark.detail else None
        lines.append(tag("li", sign, tag("div", name, remark.text, detail), class_=remark.kind))
    return tag("ul", lines, class_="remarks")


def _alarms(run: RunFiles) -> Iterator[Remark]:
    raised: dict[str, list[Mapping[str, Any]]] = {}
    for alarm in (run.summary.get("training") or {}).get("alarms") or []:
        raised.setdefault(str(alarm["alarm"]), []).append(alarm)
    for name, alarms in raised.items():
        heads: dict[tuple[int, int], Mapping[str, Any]] = {}
        for alarm in sorted(alarms, key=lambda alarm: alarm["step"]):
            heads.setdefault((alarm["layer"], alarm["head"]), alarm)
        first = [
            f"layer {layer} head {head} at step {alarm['step']} "
            f"({_short(alarm['value'])}, threshold {_short(alarm['threshold'])})"
            for (layer, head), alarm in list(heads.items())[:_NAMED]
        ]
        more = f"; and {len(heads) - _NAMED} more" if len(heads) > _NAMED else ""
        count = "1 head" if len(heads) == 1 else f"{len(heads)} heads"
        yield Remark(
            ALARM,
            f"{_ALARMS.get(name, f'{name}: {{}}').format(count)} while training.",
            f"First seen: {'; '.join(first)}{more}.",
        )


def _short(value: float | None) -> str:
    return "no value" if value is None else f"{value:.3g}"


def _losses(run: RunFiles) -> Iterator[Remark]:
    opened, healed = run.summary.get("after_surgery"), run.summary.get("after_training")
    if opened and healed and healed["loss"] > opened["loss"]:
        cost = signed(healed["loss"] - opened["loss"], 4)
        yield Remark(CAUTION, f"Healing made it worse: {cost} nats per token on held-out text.")
    if run.summary.get("export") and run.operations and not (opened or healed):
        yield Remark(CAUTION, "The result was exported without measuring its held-out loss.")
    comparison = run.summary.get("comparison")
    if comparison:
        better = opened["loss"] - comparison["loss"] if opened else None
        said = f", {better:.3f} less than this one" if better and better > 0 else ""
        yield Remark(
            NOTE,
            f"merge={comparison['merge']} would have left a loss of "
            f"{comparison['loss']:.4f} before any healing{said}.",
        )


def _sizes(run: RunFiles) -> Iterator[Remark]:
    planned = (run.summary.get("planned") or {}).get("after") or {}
    measured = run.summary.get("after_training") or run.summary.get("after_surgery") or {}
    for field in ("parameters", "kv_bytes_per_token"):
        if field in planned and field in measured and planned[field] != measured[field]:
            yield Remark(
                CAUTION,
                f"The model does not have the {field.replace('_', ' ')} that was planned.",
                f"Planned {planned[field]:,}, found {measured[field]:,}.",
            )


def _export(run: RunFiles) -> Iterator[Remark]:
    export = run.summary.get("export") or run.plan.get("export") or {}
    if export.get("format") == "record":
        yield Remark(
            CAUTION,
            "Only transformers loads the export, and only after `import surgery`.",
            f"{export['reason'].partition(';')[0]}.",
        )
    else:
        for runtime, why in (export.get("without") or {}).items():
            yield Remark(CAUTION, f"{runtime} cannot serve the export.", f"{why}.")
    if "max_logit_difference_after_reload" in export:
        if export["max_logit_difference_after_reload"] is None:
            yield Remark(CAUTION, "The export was not loaded again and compared.")
    elif run.operations:
        yield Remark(NOTE, "Nothing was exported in this run.")


def _tasks(run: RunFiles) -> Iterator[Remark]:
    for harm in (run.summary.get("tasks") or {}).get("hurts") or []:
        yield Remark(
            CAUTION,
            f"The mask for {harm['mask']} costs {harm['task']} {harm['cost']:.3f} nats per token.",
        )


def _plan(run: RunFiles) -> Iterator[Remark]:
    for decision in run.plan.get("open_decisions") or []:
        yield Remark(CAUTION, f"Left open by the plan: {decision}.")
    blocks = run.plan.get("left_alone") or []
    if blocks:
        yield Remark(
            NOTE,
            f"{len(blocks)} attention blocks were left alone.",
            f"{blocks[0]['path']}, …: {blocks[0]['reason']}.",
        )
    for note in run.plan.get("notes") or []:
        yield Remark(NOTE, f"{note}.")


def anchor(found: list[Remark]) -> Markup | None:
    """A line on how many there are, for the top of the page."""
    counts = {kind: sum(r.kind == kind for r in found) for kind in (ALARM, CAUTION, NOTE)}
    names = {ALARM: ("alarm", "alarms"), CAUTION: ("caution", "cautions"), NOTE: ("note", "notes")}
    parts = [f"{n} {names[kind][n > 1]}" for kind, n in counts.items() if n]
    return join(tag("a", ", ".join(parts), href="#remarks")) if parts else None
