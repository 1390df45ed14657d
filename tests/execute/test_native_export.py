"""Saved as the architecture's own, operated models load where this project is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.execute.live import apply_
from tests.families import SEPARATE, family, logits
from tests.operations.reference import gqa_plan

# Runs in a process of its own, over directories given as arguments.
RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

result = {}
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # as there: other kernels sum in other orders
    ids, expected = torch.load(f"{directory}/expected.pt")
    with torch.no_grad():
        difference = (model(input_ids=ids, use_cache=False).logits - expected).abs().max()
    result[directory] = [float(difference), model.config.num_key_value_heads]
assert "surgery" not in sys.modules
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Family → largest difference of logits after reloading, and the config's KV heads."""
    root = tmp_path_factory.mktemp("exports")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and there: sums over experts depend on how they are split
    for name in SEPARATE:
        model = family(name, dtype=torch.float32)
        apply_(model, gqa_plan(model, 2))
        model.save_pretrained(root / name)
        ids = torch.arange(3, 15)[None]
        torch.save((ids, logits(model, ids)), root / name / "expected.pt")
    torch.set_num_threads(threads)
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *(str(root / name) for name in SEPARATE)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return {Path(directory).name: found for directory, found in result.items()}


@pytest.mark.parametrize("name", SEPARATE)
def test_stock_transformers_loads_the_same_model(name: str, reloaded: dict[str, Any]) -> None:
    difference, kv_heads = reloaded[name]
    assert difference <= 1e-6
    assert kv_heads == 2
