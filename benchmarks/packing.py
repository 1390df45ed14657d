"""Packed documents on every causal type of the installed transformers: isolated, refused, leaking.

python -m benchmarks.packing                # every type; keeps the figures
python -m benchmarks.packing llama,bloom    # some types; prints only

Each type is a tiny random model. It is fed packed rows as the pipeline feeds them, and every
document's logits are compared with those of the document alone. "By positions before" is what came
of it when `position_ids` were all that a model was given.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.coverage import zoo
from benchmarks.coverage.feeds import FIRST, LAST
from benchmarks.results_file import keep
from surgery.console import say, track_progress
from surgery.errors import ConfigError
from surgery.models.forward import get_forward_options
from surgery.models.packed import ask_tiny_model, find_packing, make_inputs

KIND = "causal-lm"
BACKENDS = ("eager", "sdpa")
# Lengths of documents: other ones than those with which the product asks.
ROWS = ((4, 13, 3), (1, 9, 10), (20,))
# Of the largest logit, in fp32. Documents that see each other differ by a hundred times as much.
TOLERANCE = 1e-4
POSITIONS, MASK, REFUSED = "isolated by positions", "isolated by a mask", "refused"
LEAKING, NEEDLESS, NOT_RUN = "leaking", "refused without need", "takes no rows of tokens"


def main(arguments: list[str]) -> int:
    """Ask, compare and count; 1 if anything leaks or is refused without need."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = arguments[0].split(",") if arguments else zoo.model_types(KIND)
    start = time.perf_counter()
    types: dict[str, Any] = {}
    with track_progress("packed documents", total=len(chosen)) as steps:
        for model_type in chosen:
            types[model_type] = check_type(model_type)
            steps.advance()
    counts = {backend: count_outcomes(types, backend) for backend in (*BACKENDS, "default")}
    for backend, found in counts.items():
        say(f"{backend}: " + ", ".join(f"{outcome} {n}" for outcome, n in found.items()))
    wrong = {LEAKING, NEEDLESS}
    found_wrong = [t for t in types if wrong & {o["outcome"] for o in get_outcomes(types[t])}]
    for model_type in found_wrong if not arguments else types:
        say(f"{model_type}: {types[model_type]}")
    if not arguments:
        seconds = round(time.perf_counter() - start)
        keep("packing", {"seconds": seconds, "counts": counts, "types": types})
    return 1 if found_wrong else 0


def check_type(model_type: str) -> dict[str, Any]:
    """Outcomes by backend; `default` names the one that transformers takes by itself."""
    reason = zoo.UNBUILDABLE.get((KIND, model_type))
    if reason is not None:
        return {"unbuildable": reason}
    found: dict[str, Any] = {"default": "eager"}
    for backend in BACKENDS:
        try:
            model = zoo.tiny_model(KIND, model_type, attention=backend)
        except ValueError:  # the type has no such backend
            continue
        found["default"] = backend
        found[backend] = check_model(model)
    return found


@torch.no_grad()
def check_model(model: PreTrainedModel) -> dict[str, Any]:
    """What comes of packed rows in this model."""
    batch = make_batch()
    options = get_forward_options(model)
    try:
        alone = [
            model(input_ids=batch["input_ids"][row, where][None], **options).logits[0].float()
            for row, where in list_documents()
        ]
    except Exception as error:
        return {"outcome": NOT_RUN, "reason": " ".join(str(error).split())}
    before = compute_distance(model, {**batch, **options}, alone)
    tiny = ask_tiny_model(type(model), model.config, model.config._attn_implementation)
    asked = {"asked": "itself" if tiny is None else "tiny", "by positions before": before}
    try:
        inputs = make_inputs(model, batch)
    except ConfigError as refusal:
        packing = find_packing(model)
        needless = before is not None and before <= TOLERANCE
        return asked | {
            "outcome": NEEDLESS if needless else REFUSED,
            "reason": refusal.problem.partition(": ")[2],
            "padded rows are exact": packing.padded,
        }
    distance = compute_distance(model, inputs, alone)
    outcome = MASK if "attention_mask" in inputs else POSITIONS
    if distance is None or not distance <= TOLERANCE:
        outcome = LEAKING
    return asked | {"outcome": outcome, "difference": distance}


def make_batch() -> dict[str, Tensor]:
    """Rows of whole documents, without padding."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(FIRST, LAST, (len(ROWS), sum(ROWS[0])), generator=random)
    positions = [[place for length in row for place in range(length)] for row in ROWS]
    return {"input_ids": ids, "position_ids": torch.tensor(positions)}


def list_documents() -> list[tuple[int, slice]]:
    """(row, where) of every document."""
    return [
        (row, slice(end - length, end))
        for row, lengths in enumerate(ROWS)
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]


def compute_distance(
    model: PreTrainedModel, inputs: dict[str, Any], alone: list[Tensor]
) -> float | None:
    """Largest difference from the documents alone, of the largest logit; `None`: it cannot run."""
    try:
        packed = model(**inputs).logits.float()
    except Exception:
        return None
    pairs = zip(list_documents(), alone, strict=True)
    distance = max(float((packed[row, where] - each).abs().max()) for (row, where), each in pairs)
    return distance / max(float(each.abs().max()) for each in alone)


def get_outcomes(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found[backend] for backend in BACKENDS if backend in found]


def count_outcomes(types: dict[str, Any], backend: str) -> dict[str, int]:
    """Count the types by outcome, and those whose documents met when positions were all."""
    counted: Counter[str] = Counter()
    for found in types.values():
        outcome = found.get(found.get("default") if backend == "default" else backend)
        if outcome is None:
            continue
        counted["types"] += 1
        counted[outcome["outcome"]] += 1
        if outcome["outcome"] != NOT_RUN:
            before = outcome["by positions before"]
            counted["not as alone before"] += before is None or before > TOLERANCE
            counted["asked themselves"] += outcome["asked"] == "itself"
    order = ("types", POSITIONS, MASK, REFUSED, LEAKING, NEEDLESS, NOT_RUN)
    return {name: counted[name] for name in (*order, "not as alone before", "asked themselves")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
