"""What is read from the folder of a row. Keys that are absent, or new, do no harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

Figures = dict[str, Any]

MEASURED = ("loss", "parameters", "kv_bytes_per_token")


def read_loss(folder: Path) -> Figures:
    """Of the untouched model."""
    moment = _summary(folder / "measure")["before"]
    return _measured(moment) | {name: moment.get(name) for name in ("prefill_ms", "decode_ms")}


def read_cut(folder: Path) -> Figures:
    """Of the export, and what calibration says of itself."""
    cut = _summary(folder / "cut")
    found = _measured(_summary(folder / "measure")["before"])
    found["format"] = (cut.get("export") or {}).get("format")
    return found | _calibrated(cut.get("calibration"))


def read_scores(folder: Path) -> Figures:
    table = json.loads((folder / "score/importance.json").read_text(encoding="utf-8"))
    return {name: table.get(name) for name in ("estimator", "tokens", "loss")}


def read_exchange(folder: Path) -> Figures:
    """Before and after, in one process: what changed in the loss and on the clock."""
    (path,) = folder.glob("*/summary.json")
    summary = json.loads(path.read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after_surgery"]
    export = summary.get("export") or {}
    return {
        "loss": after["loss"],
        "loss_difference": after["loss"] - before["loss"],
        "prefill_ratio": _over(before["prefill_ms"], after["prefill_ms"]),
        "decode_ratio": _over(before["decode_ms"], after["decode_ms"]),
        "prefill_ms": after["prefill_ms"],
        "decode_ms": after["decode_ms"],
        "format": export.get("format"),
        "reload_difference": export.get("max_logit_difference_after_reload"),
    }


def read_healing(folder: Path) -> Figures:
    summary = _summary(folder / "heal")
    found = _trained(summary["training"]) | _measured(summary["after_training"])
    return found | {"loss_before": summary["before"]["loss"]}


def read_healing_elsewhere(folder: Path) -> Figures:
    """Healed on other text than all losses are of; the export was measured on these."""
    found = _trained(_summary(folder / "heal")["training"])
    return found | {"curve": None} | _measured(_summary(folder / "measure")["before"])


def _trained(training: Mapping[str, Any]) -> Figures:
    held_out = training.get("held_out") or {}
    losses = [pair for pair in held_out.get("losses", []) if pair[1] is not None]
    reverted = training.get("reverted") is not None  # to the weights of before the first step
    return {
        "tokens": training["tokens"],
        "steps": training["steps"],
        "lr": training["lr"],
        "kept_step": 0 if reverted else held_out.get("kept_step"),
        "last_loss": held_out.get("last_loss"),
        "trainable_parameters": training.get("trainable_parameters"),
        "curve": losses,
    }


def read_monitors(folder: Path) -> Figures:
    found = json.loads((folder / "monitors/monitors.json").read_text(encoding="utf-8"))
    names = ("observed_ratio", "observed_ratio_of_medians", "overhead_at_default_cadence")
    return {name: found[name] for name in (*names, "default_cadence", "pairs")}


def read_roles(folder: Path) -> Figures:
    """How many heads have each role, and where; depths are shares of the layers, from 0 to 1."""
    result = json.loads((folder / "analyze/analysis/heads.json").read_text(encoding="utf-8"))
    heads = result["heads"]
    last = max(1, max(head["layer"] for head in heads))
    roles: dict[str, dict[str, Any]] = {}
    for role in dict.fromkeys(head["role"] for head in heads):
        mine = [head for head in heads if head["role"] == role]
        best = max(mine, key=lambda head: head["scores"].get(role) or 0.0)
        roles[role] = {
            "heads": len(mine),
            "depth": median(head["layer"] / last for head in mine),
            "first_layer": min(head["layer"] for head in mine),
            "last_layer": max(head["layer"] for head in mine),
            "best": [best["layer"], best["head"]],
            "score": best["scores"].get(role),
        }
    return {"roles": roles, "heads": len(heads), "layers": last + 1}


def read_costs(folder: Path) -> list[Figures]:
    """Seconds and peak memory of each stage of each run in the folder, in their order."""
    found = []
    paths = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        summary = json.loads(path.read_text(encoding="utf-8"))
        memory = summary.get("memory", {})
        for stage, seconds in summary["timings"].items():
            peaks = memory.get(stage, {})
            found.append(
                {
                    "run": path.parent.name,
                    "stage": stage,
                    "seconds": seconds,
                    "process": peaks.get("process"),
                    "gpu": peaks.get("gpu"),
                }
            )
    return found


def read_machine(folder: Path) -> Figures:
    """Machine and versions as a run in the folder names them; nothing where there is none."""
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {name: summary[name] for name in ("machine", "versions")}
    return {}


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def _measured(moment: Mapping[str, Any]) -> Figures:
    found = {name: moment.get(name) for name in MEASURED}
    return found | {"by_position": moment.get("loss_by_position")}


def _calibrated(calibration: Any) -> Figures:
    """Plain numbers and texts at the top of what calibration says, such as tokens per unknown."""
    if not isinstance(calibration, Mapping):
        return {}
    plain = {k: v for k, v in calibration.items() if isinstance(v, (int, float, str))}
    return {"calibration": plain}


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
