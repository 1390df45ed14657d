"""Another package's operation, by entry point: planned, performed, trained, exported, reloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

OUTSIDE = Path(__file__).parent / "outside"

RELOAD = """
import copy, sys
import torch
import surgery
from transformers import AutoModelForCausalLM

original = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()
ids = torch.arange(3, 35)[None]

# The oracle: dividing logits by 2 is halving the queries.
oracle = copy.deepcopy(model)
for layer, other in zip(oracle.model.layers, original.model.layers):
    layer.self_attn.scaling = other.self_attn.scaling
    layer.self_attn.q_proj.weight.data /= 2
with torch.no_grad():
    print(float((model(ids).logits - oracle(ids).logits).abs().max()))
print([layer.self_attn.scaling / other.self_attn.scaling
       for layer, other in zip(model.model.layers, original.model.layers)])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package, from a copy of its source."""
    folder = tmp_path_factory.mktemp("outside")
    source = folder / "source"
    shutil.copytree(OUTSIDE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run_python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run_dir(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the operation, through every stage."""
    folder = tmp_path_factory.mktemp("run")
    done = run_python(
        installed,
        "train.py",
        f"hydra.run.dir={folder}",
        "attention=[temperature]",
        "attention.temperature.value=2",
        "stages=[plan,measure,operate,train,export,report]",
        "data.seq_len=64",
        "data.batch_size=2",
        "measure.windows=4",
        "measure.repeats=1",
        "report.prompts=[]",
        "measure.decode_tokens=4",
        "trainer.max_steps=2",
        "trainer.enable_progress_bar=false",
        "logger=none",
    )
    assert done.returncode == 0, done.stderr
    assert "operation temperature" in done.stdout
    return folder


def test_it_goes_all_the_way(installed: Path, run_dir: Path) -> None:
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan["export"]["format"] == "record"
    page = (run_dir / "report.html").read_text()
    assert "temperature" in page
    card = (run_dir / "export" / "README.md").read_text()
    assert "temperature" in card
    original = ROOT / "surgery" / "models" / "embedded"
    reloaded = run_python(installed, "-c", RELOAD, str(original), str(run_dir / "export"))
    assert reloaded.returncode == 0, reloaded.stderr
    difference, shares = reloaded.stdout.splitlines()
    assert float(difference) <= 1e-5
    assert set(json.loads(shares)) == {0.5}


def test_a_mistake_in_it_is_answered_as_any_other(installed: Path, tmp_path: Path) -> None:
    done = run_python(
        installed,
        "train.py",
        f"hydra.run.dir={tmp_path}/run",
        "stages=[plan]",
        "attention=[temperature]",
        "attention.temperature.value=0",
    )
    assert done.returncode == 2
    assert "attention.temperature.value: must be above 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_package_the_plan_says_what_is_missing(run_dir: Path, tmp_path: Path) -> None:
    load = "import surgery, sys, pathlib\n"
    load += "from surgery.models.source import *\nfrom transformers import AutoModelForCausalLM\n"
    load += f"plan = surgery.load_plan(pathlib.Path({str(run_dir)!r}))\n"
    load += "model = AutoModelForCausalLM.from_pretrained(find_embedded_dir())\n"
    load += "try:\n    surgery.apply_(model, plan)\nexcept surgery.PlanError as error: print(error)"
    done = run_python(tmp_path, "-c", load)
    assert "'temperature', which is not installed here" in done.stdout, done.stderr
