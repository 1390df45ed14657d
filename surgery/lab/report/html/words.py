"""What a report says in sentences, and the code that it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.lab.report.healing import describe_gap, describe_healing
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.quantities import format_change, format_signed

# Nats per token that no one would notice.
_UNNOTICED = 0.0005
_FORMATS = {
    "native": "in the architecture's own format",
    "converted": "in the format of another architecture",
    "record": "in transformers' format with a record",
}
ALARM, CAUTION, NOTE = "alarm", "caution", "note"
_ALARMS = {
    "collapse": "Entropy collapsed in {}",
    "uniform": "Attention was near uniform in {}",
    "logits": "Logits exploded in {}",
    "dead": "No output was left of {}",
}
# Heads named per alarm; the map shows all.
_NAMED = 6
# end of the class's name → transformers' class that finds it
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Remark:
    """One thing to know before shipping.

    Attributes:
        kind: ``alarm`` (a head went wrong), ``caution`` (look at it first) or ``note``.
        text: what.
        detail: more of it.
    """

    kind: str
    text: str
    detail: str = ""


def write_headline(run: RunFiles) -> str:
    """One sentence: savings, and what they cost in held-out loss."""
    is_measured = "loss" in run.before and "loss" in run.after
    cost = run.after["loss"] - run.before["loss"] if is_measured else 0.0
    nats = f"{format_signed(cost)} nats per token"
    if not run.operations:
        trained = f"Trained without surgery: {nats} on held-out text"
        return trained if is_measured else "Nothing was changed: the model was looked at"
    saved = _list_savings(run)
    if not is_measured:
        return f"{saved or 'Nothing gets smaller'}: planned, not measured"
    when = "after healing" if run.part("after_training") else "before any healing"
    price = f"for {nats}" if cost > 0 else f"and {nats}"
    price = "and the same held-out loss" if abs(cost) < _UNNOTICED else price
    return f"{saved or 'Sizes stay the same'}, {price} {when}"


def _list_savings(run: RunFiles) -> str:
    """What became smaller; FLOPs where nothing else did."""
    names = {"KV cache": "kv_bytes_per_token", "parameters": "parameters"}
    for fields in (names, {"attention FLOPs": "attention_flops"}):
        moved = {k: format_change(run.before.get(v), run.after.get(v)) for k, v in fields.items()}
        parts = [f"{name} {change}" for name, change in moved.items() if change not in ("", "same")]
        if parts:
            return ", ".join(parts)
    return ""


def write_explanation(run: RunFiles) -> str:
    """A sentence or two on what happened in between, and who loads the export."""
    parts = []
    before, opened, export = (run.part(k) for k in ("before", "after_surgery", "export"))
    if before and opened:
        gap, closed = opened["loss"] - before["loss"], run.summary.get("gap_closed")
        healed = ""
        if closed is not None:
            did = f"closed {closed:.0%} of it" if closed >= 0 else f"widened it by {-closed:.0%}"
            healed = f"; {run.part('training').get('steps')} steps of healing {did}"
        changed = f"Surgery opened a gap of {gap:.3f} nats per token{healed}."
        same = "Surgery changed nothing in what the model computes."
        unsure = closed is None and describe_gap(run.summary)
        if unsure and gap >= _UNNOTICED:
            changed = f"{unsure[0].upper()}{unsure[1:]}."
        parts.append(same if abs(gap) < _UNNOTICED else changed)
    if export:
        # transformers did load it; of the others it is what their sources say.
        others = [name for name in export["runtimes"] if name != "transformers"]
        loads = ["transformers loads it"] if "transformers" in export["runtimes"] else []
        if others:
            verb = "list" if len(others) > 1 else "lists"
            loads.append(f"{' and '.join(others)} {verb} it (not run here)")
        loaded = f"; {', '.join(loads)}" if loads else ""
        parts.append(f"The export is {_FORMATS[export['format']]}{loaded}.")
    return " ".join(parts)


def collect_remarks(run: RunFiles, undrawn: Sequence[str] = ()) -> list[Remark]:
    """What to know before shipping, the gravest first.

    Args:
        undrawn: a sentence for whatever the page has no picture of.
    """
    found = [
        *_read_alarms(run),
        *_compare_figures(run),
        *_read_export(run),
        *_read_plan(run.plan),
        *(Remark(CAUTION, problem) for problem in (*run.problems, *undrawn)),
    ]
    return sorted(found, key=lambda remark: (ALARM, CAUTION, NOTE).index(remark.kind))


def _read_alarms(run: RunFiles) -> Iterator[Remark]:
    alarms = run.part("training").get("alarms") or []
    raised: dict[str, dict[tuple[int, int], str]] = {str(alarm["alarm"]): {} for alarm in alarms}
    for alarm in sorted(alarms, key=lambda alarm: alarm["step"]):
        figures = (alarm["value"], alarm["threshold"])
        value, threshold = ("no value" if x is None else f"{x:.3g}" for x in figures)
        where = f"layer {alarm['layer']} head {alarm['head']} at step {alarm['step']}"
        first = f"{where} ({value}, threshold {threshold})"
        raised[str(alarm["alarm"])].setdefault((alarm["layer"], alarm["head"]), first)
    for name, heads in raised.items():
        count = "1 head" if len(heads) == 1 else f"{len(heads)} heads"
        seen = "; ".join(list(heads.values())[:_NAMED])
        more = f"; and {len(heads) - _NAMED} more" if len(heads) > _NAMED else ""
        text = f"{_ALARMS.get(name, f'{name}: {{}}').format(count)} while training."
        yield Remark(ALARM, text, f"First seen: {seen}{more}.")


def _compare_figures(run: RunFiles) -> Iterator[Remark]:
    """Losses and sizes that are not as they should be."""
    opened, healed = run.part("after_surgery"), run.part("after_training")
    if opened and healed and healed["loss"] > opened["loss"]:
        cost = format_signed(healed["loss"] - opened["loss"], 4)
        yield Remark(CAUTION, f"Healing made it worse: {cost} nats per token on held-out text.")
    training = run.part("training")
    for line in describe_healing(training, exported=bool(run.part("export"))):
        found = training.get("held_out") or {}
        last = found["losses"][-1][0] if found else None
        smooth = found.get("best_step") == found.get("kept_step") == last
        smooth = smooth and not training.get("reverted")
        yield Remark(NOTE if smooth else CAUTION, f"{line[0].upper()}{line[1:]}.")
    if run.part("export") and run.operations and not (opened or healed):
        yield Remark(CAUTION, "The result was exported without measuring its held-out loss.")
    other = run.part("comparison")
    if other:
        better = opened["loss"] - other["loss"] if opened else 0.0
        less = f", {better:.3f} less than this one" if better > 0 else ""
        loss = f"a loss of {other['loss']:.4f} before any healing{less}"
        yield Remark(NOTE, f"{other['name']} would have left {loss}.")
    planned, measured = run.part("planned").get("after") or {}, healed or opened
    for field in ("parameters", "kv_bytes_per_token"):
        if field in planned and field in measured and planned[field] != measured[field]:
            text = f"The model does not have the {field.replace('_', ' ')} that was planned."
            detail = f"Planned {planned[field]:,}, found {measured[field]:,}."
            yield Remark(CAUTION, text, detail)


def _read_export(run: RunFiles) -> Iterator[Remark]:
    """What stands in the way of using the result."""
    export = run.part("export") or run.plan.get("export") or {}
    if export.get("format") == "record":
        text = "Only transformers loads the export, and only after `import surgery`."
        yield Remark(CAUTION, text, f"{export['reason'].partition(';')[0]}.")
    else:
        for runtime, why in (export.get("without") or {}).items():
            yield Remark(CAUTION, f"{runtime} cannot serve the export.", f"{why}.")
    if "max_logit_difference_after_reload" in export:
        if export["max_logit_difference_after_reload"] is None:
            yield Remark(CAUTION, "The export was not loaded again and compared.")
    elif run.operations:
        yield Remark(NOTE, "Nothing was exported in this run.")
    for harm in run.part("tasks").get("hurts") or []:
        cost = f"costs {harm['task']} {harm['cost']:.3f} nats per token"
        yield Remark(CAUTION, f"The mask for {harm['mask']} {cost}.")


def _read_plan(plan: Mapping[str, Any]) -> Iterator[Remark]:
    for decision in plan.get("open_decisions") or []:
        yield Remark(CAUTION, f"Left open by the plan: {decision}.")
    blocks = plan.get("left_alone")
    if blocks:
        text = f"{len(blocks)} attention blocks were left alone."
        yield Remark(NOTE, text, f"{blocks[0]['path']}, …: {blocks[0]['reason']}.")
    for note in plan.get("notes") or []:
        yield Remark(NOTE, f"{note}.")


def write_snippet(run: RunFiles) -> str:
    """Python that loads the export, run in the run directory; empty where there is none."""
    export = run.part("export")
    if not export:
        return ""
    name = str(run.model["class"])
    auto = next((auto for end, auto in _AUTO.items() if name.endswith(end)), name)
    chosen = run.plan.get("implementation")
    extra = f', attn_implementation="{chosen}"' if chosen else ""
    record = "import surgery  # reads the record; without it transformers cannot\n\n"
    return (
        f"{record if export['format'] == 'record' else ''}"
        f"from transformers import {', '.join(sorted((auto, 'AutoTokenizer')))}\n\n"
        f'model = {auto}.from_pretrained("{export["path"]}"{extra})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{export["path"]}")'
    )
