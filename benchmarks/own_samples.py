"""What to calibrate and heal on where a model's own kind of text is not at hand.

python -m benchmarks.own_samples                                   # the embedded model; minutes
python -m benchmarks.own_samples --model DIR --dtype bfloat16 --real a.jsonl --other b.jsonl

Each change of the model is fitted and healed on three kinds of text: real text of the kind that
it is measured on, samples of the original (`data=self`), and real text of another kind. The loss is
always on the same held-out windows of the real text, as cut and healed. For the embedded model the
kinds are the code of the standard library, and its docstrings and comments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

import surgery.hydra  # noqa: F401  (recipes and operations are found by it)
from benchmarks.results_file import keep
from surgery.config.schema import Part
from surgery.console import say
from surgery.data.sources import is_held_out
from surgery.data.stdlib import read_stdlib
from surgery.pipeline.run import execute

CHANGES = {
    "gqa": (
        "attention=[gqa]",
        "attention.gqa.merge=optimal",
        "attention.gqa.grouping=similarity",
        "attention.gqa.kv_heads={kv_heads}",
    ),
    "prune": (
        "attention=[prune_heads]",
        "attention.prune_heads.amount={amount}",
        "attention.prune_heads.estimator={estimator}",
        "attention.prune_heads.refit=true",
    ),
}
TEXTS = ("real", "self", "other")
HELD_OUT = 0.1
_QUIET = (
    "objective=distill",
    "logger=none",
    "callbacks.checkpoint=null",
    "measure.repeats=1",
    "measure.decode_tokens=2",
    "stages=[plan,measure,calibrate,operate,train]",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cells, print each, and keep the figures."""
    options = _make_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_texts(options, folder)
        cells: list[dict[str, Any]] = []
        about = {name: str(value) for name, value in vars(options).items()}
        for change in options.changes:
            for text in options.texts:
                cells.append(measure(options, change, text, files, folder))
                keep(options.results, {"options": about, "runs": cells})  # cut off, these stay


def write_texts(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write the texts: real to fit, real held out, and the other kind."""
    kinds = {"real": (options.real, Part.code), "other": (options.other, Part.prose)}
    documents = {kind: _read(path, part) for kind, (path, part) in kinds.items()}
    # The name of a document decides, so that no file is measured on of which a part was fitted.
    fitted = {
        kind: [text for name, text in found if not is_held_out(name, HELD_OUT)]
        for kind, found in documents.items()
    }
    held_out = [text for name, text in documents["real"] if is_held_out(name, HELD_OUT)]
    return {
        name: _write(folder / f"{name}.jsonl", texts)
        for name, texts in {**fitted, "held_out": held_out}.items()
    }


def _read(path: Path | None, part: Part) -> list[tuple[str, str]]:
    if path is None:
        return list(read_stdlib(part=part).items())
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
    else:
        texts = "\n".join(lines).split("\n\n")
    return [(text, text) for text in texts if text.strip()]


def _write(path: Path, texts: Sequence[str]) -> str:
    if not texts:
        sys.exit(f"{path.stem}: no document is left")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def measure(
    options: argparse.Namespace, change: str, text: str, files: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Run one cell: a change of the model, fitted and healed on one kind of text."""
    run_dir = folder / "run"
    overrides = _make_overrides(options, change, text, files)
    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, f"run_dir={run_dir}"])
    run_dir.mkdir()
    try:
        execute(cfg)
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(run_dir)
    moments = ("before", "after_surgery", "after_training")
    losses = {moment: summary[moment]["loss"] for moment in moments}
    say(
        f"{change} on {text}: {losses['before']:.4f}, as cut "
        f"+{losses['after_surgery'] - losses['before']:.4f}, healed "
        f"{losses['after_training'] - losses['before']:+.4f}"
    )
    return {
        "change": change,
        "text": text,
        "data": summary["training"]["data"],
        "fitted_on_unigram_loss": summary["data"]["unigram_loss"],
        "losses": losses,
        "gap_noise": summary["gap_noise"],
        "healing": summary["training"]["held_out"],
        "timings": summary["timings"],
        "overrides": [one for one in overrides if str(folder) not in one],
    }


def _make_overrides(
    options: argparse.Namespace, change: str, text: str, files: dict[str, str]
) -> list[str]:
    named = {"kv_heads": options.kv_heads, "amount": options.amount, "estimator": options.estimator}
    data = [f"data={'self' if text == 'self' else 'text'}", f"data.val_path={files['held_out']}"]
    if text == "self":
        windows = max(options.windows, options.steps * options.batch_size)
        data += [f"data.self.windows={windows}", f"data.self.seed={options.seed}"]
        data += [f"data.self.prompts={options.prompts}"] if options.prompts else []
    else:
        data += [f"data.path={files[text]}"]
    return [
        *(one.format(**named) for one in CHANGES[change]),
        *_QUIET,
        *data,
        f"model.path={options.model}",
        f"model.dtype={options.dtype}",
        f"seed={options.seed}",
        f"data.seq_len={options.seq_len}",
        f"data.batch_size={options.batch_size}",
        f"calibration.windows={options.windows}",
        f"calibration.keep_windows={options.windows}",
        f"importance.windows={options.windows}",
        f"measure.windows={options.measured}",
        f"trainer.max_steps={options.steps}",
        *([f"optim.lr={options.lr}"] if options.lr else []),
        *options.overrides,
    ]


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_samples", description=__doc__)
    add = parser.add_argument
    add("--model", default="embedded", help="model.path")
    add("--dtype", default="float32")
    add("--real", type=Path, help=".jsonl or .txt; by default the code of the standard library")
    add("--other", type=Path, help="by default its docstrings and comments")
    add("--changes", nargs="+", default=list(CHANGES), choices=CHANGES)
    add("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    add("--kv-heads", type=int, default=2)
    add("--amount", type=float, default=0.4, help="of the heads, pruned")
    add("--estimator", default="gate_gradient")
    add("--prompts", help="data.self.prompts")
    add("--windows", type=int, default=32, help="that are calibrated on")
    add("--measured", type=int, default=64, help="held-out windows")
    add("--seq-len", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=20, help="of healing, by distillation from the original")
    add("--lr", type=float, help="of healing; by default the default of optim.lr")
    add("--seed", type=int, default=0)
    add("--threads", type=int)
    add("--results", default="own_samples", help="name of the file in benchmarks/results")
    add("overrides", nargs="*", help="further overrides of train.py, after --")
    return parser


if __name__ == "__main__":
    main()
