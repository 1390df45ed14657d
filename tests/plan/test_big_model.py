"""A 70B model is planned in seconds, in the memory of a small one, without its weights.

Processor seconds are counted, not the clock's: other work on the machine is not the plan's. Most of
them go into importing torch and transformers; the plan itself takes two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SECONDS = 10
BYTES = 1_000_000_000
ROOT = Path(__file__).parents[2]
# What no plan needs, and what takes seconds to import.
UNNEEDED = ("datasets", "matplotlib", "pytorch_lightning", "wandb", "tensorboard")

MEASURE = f"""
import json, resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
peak = used.ru_maxrss
if sys.platform == "linux":  # ru_maxrss is inherited there, from the process that started this one
    status = dict(line.split(":") for line in open("/proc/self/status"))
    peak = 1024 * int(status["VmHWM"].split()[0])
print(json.dumps({{
    "seconds": used.ru_utime + used.ru_stime,
    "bytes": peak,
    "unneeded": [name for name in {UNNEEDED} if name in sys.modules],
}}))
"""
LIBRARY = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from surgery.plan.registry import parse_operations
from surgery.plan.make import make_plan
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("MODEL"))
plan = make_plan(model, parse_operations({"gqa": {"kv_heads": 8}}))
assert plan.sizes_before.parameters > 70e9, plan.sizes_before
assert [site.kv_heads for site in plan.after] == [8] * 80
assert plan.export.format == "native"
"""
COMMAND = """
import sys
sys.argv = ["train.py", "stages=[plan]", "model.path=MODEL", "attention=gqa",
            "attention.gqa.kv_heads=8", "hydra.run.dir=RUN"]
from surgery.cli import main
main()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config.json, and nothing else."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    directory = tmp_path_factory.mktemp("llama-70b")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measured(program: str, model_dir: Path, run_dir: Path) -> dict[str, Any]:
    program = program.replace("MODEL", str(model_dir)).replace("RUN", str(run_dir))
    done = subprocess.run(
        [sys.executable, "-c", program + MEASURE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_quick_and_small(used: dict[str, Any]) -> None:
    assert used["seconds"] < SECONDS
    assert used["bytes"] < BYTES
    assert used["unneeded"] == []


def test_the_library_plans_quickly_in_little_memory(model_dir: Path, tmp_path: Path) -> None:
    assert_quick_and_small(measured(LIBRARY, model_dir, tmp_path))


def test_the_command_line_does_and_writes_the_plan(model_dir: Path, tmp_path: Path) -> None:
    assert_quick_and_small(measured(COMMAND, model_dir, tmp_path))
    plan = json.loads((tmp_path / "plan.json").read_text())
    # 80 layers, keys and values: (64 - 8) heads of 128 rows of 8192.
    before, after = plan["sizes_before"]["parameters"], plan["sizes_after"]["parameters"]
    assert before - after == 80 * 2 * 56 * 128 * 8192
    assert plan["sizes_after"]["kv_bytes_per_token"] == plan["kv_bytes"] * 80 * 2 * 8 * 128
