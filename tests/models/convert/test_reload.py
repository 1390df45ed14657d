"""A process that never heard of this project loads what was converted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from surgery.models.convert import convert_model
from tests.families import logits

from .moving import NOPE, ROPE, model_of

# Runs in a process of its own, over directories given as arguments.
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    wrong = [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert not any(wrong), (directory, wrong)
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = model(input_ids=ids, use_cache=False).logits
    torch.save((type(model).__name__, values), f"{directory}/logits.pt")
assert "surgery" not in sys.modules
"""

CASES = {
    "MistralForCausalLM": ("llama_tied", "mistral", None),
    "Phi3ForCausalLM": ("llama_tied", "phi3", None),
    "Starcoder2ForCausalLM": ("gpt2", "starcoder2", ROPE),
    "Starcoder2ForCausalLM without positions": ("opt_unbiased", "starcoder2", NOPE),
}


def test_stock_transformers_loads_it(tmp_path: Path) -> None:
    expected = {}
    for case, (name, into, positions) in CASES.items():
        new = convert_model(model_of(name, torch.float32), into, positions)
        new.save_pretrained(tmp_path / case)
        expected[case] = logits(new)
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / case) for case in CASES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, values in expected.items():
        found, loaded = torch.load(tmp_path / case / "logits.pt")
        assert found == case.split()[0]
        assert torch.equal(loaded, values), case
