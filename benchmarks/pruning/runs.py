"""The runs that are compared: each one a `train.py` command of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.overrides import QUIET

ROOT = Path(__file__).parents[2]
TRAINED_TOKENS = 10_649_600  # of the embedded model: surgery/models/embedded/README.md
_ENOUGH = 2000  # characters of a failed run's output
_QUIET = (
    *QUIET,
    "trainer.limit_val_batches=0",  # the last weights are compared, as they are
    "measure.windows=512",
    "measure.repeats=1",
    "measure.decode_tokens=2",
)


@dataclass(frozen=True)
class Run:
    """One way to a smaller model.

    Attributes:
        group: what it is compared with.
        overrides: of `train.py`.
    """

    name: str
    group: str
    what: str
    overrides: tuple[str, ...]


_PRUNE = "+recipe=prune_heads"
_PLAIN = "attention.prune_heads.refit=false"
_HALF = "+recipe=distill_heads"
_NO_ATTENTION = "objective.attention_weight=0"
_SCRATCH = (
    "+recipe=pretrain_tiny",
    "data.batch_size=8",
    "model.scratch.num_attention_heads=4",
    "model.scratch.num_key_value_heads=4",
    "+model.scratch.head_dim=32",
    "trainer.precision=32-true",
    "export.dtype=auto",
)
P, LESS, S = "40% of the heads", "fewer heads", "half the heads of every layer"

RUNS = (
    Run("recipe", P, "`+recipe=prune_heads` as it stands", (_PRUNE,)),
    Run("no refit", P, "output projections as they were", (_PRUNE, _PLAIN)),
    Run("per layer", P, "as many of every layer", (_PRUNE, "attention.prune_heads.scope=layer")),
    Run(
        "iterative",
        P,
        "measure, cut, heal, four times",
        (_PRUNE, _PLAIN, "attention.prune_heads.schedule=iterative"),
    ),
    Run(
        "gradual",
        P,
        "gates closed along a cubic over half the steps",
        (_PRUNE, _PLAIN, "attention.prune_heads.schedule=gradual"),
    ),
    Run("a tenth", LESS, "10% of the heads", (_PRUNE, "attention.prune_heads.amount=0.1")),
    Run("a fifth", LESS, "20% of the heads", (_PRUNE, "attention.prune_heads.amount=0.2")),
    Run(
        "random",
        P,
        "heads drawn at random, the control",
        (_PRUNE, "attention.prune_heads.estimator=random"),
    ),
    Run("distil", S, "`+recipe=distill_heads` as it stands", (_HALF,)),
    Run("distil logits", S, "the same without matching attention", (_HALF, _NO_ATTENTION)),
    Run(
        "prune, then train", S, "the same heads, trained on the text alone", (_HALF, "objective=lm")
    ),
    Run("from scratch", S, "random weights, trained on the text alone", _SCRATCH),
    Run(
        "from scratch, distilled",
        S,
        "random weights, trained from the original's logits",
        (*_SCRATCH, "objective=distill", "objective.teacher=embedded"),
    ),
)


def command(run: Run, steps: int, seed: int, folder: Path) -> list[str]:
    """`steps` of 8 windows of 512 tokens."""
    return [
        sys.executable,
        "train.py",
        *run.overrides,
        *_QUIET,
        f"trainer.max_steps={steps}",
        "data.batch_size=8",
        f"seed={seed}",
        f"hydra.run.dir={folder}",
        *(("optim.warmup_steps=20",) if run.name.startswith("from scratch") else ()),
    ]


def perform(run: Run, steps: int, seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """Its summary; a run that is there already is not done again.

    Raises:
        RuntimeError: with the end of what it said.
    """
    path = folder / "summary.json"
    if not path.is_file():
        done = subprocess.run(
            command(run, steps, seed, folder.absolute()),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if done.returncode:
            raise RuntimeError(f"{run.name} failed:\n{done.stdout[-_ENOUGH:]}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
