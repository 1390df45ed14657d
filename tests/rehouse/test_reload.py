"""A process that never heard of this project loads what was re-housed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.rehouse import rehouse
from tests.families import logits

from .moving import NOPE, ROPE, model_of

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", output_loading_info=True
)
wrong = [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
assert not any(wrong), wrong
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, 61, (2, 12), generator=generator)
with torch.no_grad():
    torch.save((type(model).__name__, model(input_ids=ids, use_cache=False).logits), sys.argv[2])
assert "surgery" not in sys.modules
"""


@pytest.mark.parametrize(
    ("name", "into", "positions", "kind"),
    [
        ("llama_tied", "mistral", None, "MistralForCausalLM"),
        ("llama_tied", "phi3", None, "Phi3ForCausalLM"),
        ("gpt2", "starcoder2", ROPE, "Starcoder2ForCausalLM"),
        ("opt_unbiased", "starcoder2", NOPE, "Starcoder2ForCausalLM"),
    ],
)
def test_stock_transformers_loads_it(name, into, positions, kind, tmp_path: Path) -> None:
    new = rehouse(model_of(name, torch.float32), into, positions)
    new.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, values = torch.load(tmp_path / "logits.pt")
    assert found == kind
    assert torch.equal(values, logits(new))
