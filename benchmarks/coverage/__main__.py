"""Every operation on every architecture of the installed transformers.

python -m benchmarks.coverage                      # everything; writes figures and page
python -m benchmarks.coverage variants             # other configs than the defaults; writes both
python -m benchmarks.coverage variants llama,cohere # those of some types; prints only
python -m benchmarks.coverage causal-lm llama,gpt2 # some types; prints only
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
import transformers

from benchmarks.coverage import zoo
from benchmarks.coverage.check import CHECKS, WRONG, check, check_variant
from benchmarks.coverage.page import FIGURES, PAGE, page
from benchmarks.coverage.variants import format_variant, list_variants
from surgery.console import say, track_progress


def main(arguments: list[str]) -> int:
    """Check, print what is wrong, and write the page if everything was checked."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums over experts depend on how they are split
    if arguments[:1] == ["variants"]:
        return _main_variants(arguments[1:])
    kinds = [arguments[0]] if arguments else list(zoo.KINDS)
    only = arguments[1].split(",") if len(arguments) > 1 else None
    start = time.perf_counter()
    types: dict[str, Any] = {}
    for kind in kinds:
        chosen = [t for t in zoo.model_types(kind) if only is None or t in only]
        types[kind] = {}
        with track_progress(kind, total=len(chosen)) as steps:
            for model_type in chosen:
                types[kind][model_type] = _checked(kind, model_type)
                steps.advance()
    wrong = _report(types, aloud=bool(arguments))
    found = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start),
        "operations": list(CHECKS),
        "types": types,
    }
    if not arguments:
        found["variants"] = _check_variants(None)
        wrong += _report(found["variants"], aloud=False)
        FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
        say(f"{PAGE}")
    return 1 if wrong else 0


def _main_variants(arguments: list[str]) -> int:
    """Check other configs than the defaults, and keep what was found of the defaults."""
    variants = _check_variants(arguments[0].split(",") if arguments else None)
    wrong = _report(variants, aloud=bool(arguments))
    if not arguments:
        found = json.loads(FIGURES.read_text(encoding="utf-8"))
        found["variants"] = variants
        FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
        say(f"{PAGE}")
    return 1 if wrong else 0


def _check_variants(only: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in zoo.KINDS:
        chosen = [t for t in zoo.model_types(kind) if only is None or t in only]
        found[kind] = {}
        with track_progress(f"{kind}, other configs", total=len(chosen)) as steps:
            for model_type in chosen:
                for fields in list_variants(kind, model_type):
                    outcomes = check_variant(kind, model_type, fields)
                    if not outcomes:
                        continue
                    found[kind][format_variant(model_type, fields)] = {
                        name: outcome.to_json() for name, outcome in outcomes.items()
                    }
                steps.advance()
    return found


def _checked(kind: str, model_type: str) -> dict[str, Any]:
    reason = zoo.UNBUILDABLE.get((kind, model_type))
    if reason is not None:
        return {"unbuildable": reason}
    return {name: outcome.to_json() for name, outcome in check(kind, model_type).items()}


def _report(types: dict[str, Any], *, aloud: bool) -> int:
    wrong = 0
    for kind, found in types.items():
        for model_type, outcomes in found.items():
            for operation, outcome in outcomes.items():
                status = outcome["status"] if isinstance(outcome, dict) else "unbuildable"
                wrong += status == WRONG
                if aloud or status == WRONG:
                    more = outcome.get("reason", "") if isinstance(outcome, dict) else outcome
                    say(f"{kind} {model_type} {operation}: {status} {more}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
