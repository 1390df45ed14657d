"""A GGUF goes through every stage, with a teacher from pytorch_model.bin."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.gguf_files import Kind, make_llama, write_gguf
from tests.models.sources import source

RUN = (
    "attention=mqa",
    "attention.gqa.merge=mean",
    "objective=distill",
    "data=text",
    "data.seq_len=24",
    "data.batch_size=4",
    "data.val_fraction=0.3",
    "measure.windows=4",
    "measure.prefill_tokens=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "measure.batch_size=4",
    "calibration.compare=false",
    "callbacks.checkpoint.every_n_train_steps=1",
    "logger=none",
    "optim.lr=1e-3",
)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The model, its teacher (the same weights, pickled), and text of its letters."""
    folder = tmp_path_factory.mktemp("sources")
    gguf = write_gguf(folder / "tiny.gguf", make_llama(), kind=Kind.Q8_0)
    found = source(gguf)
    found.load().save_pretrained(folder / "teacher")
    found.load_tokenizer().save_pretrained(folder / "teacher")
    weights = folder / "teacher" / "model.safetensors"
    torch.save(load_file(weights), folder / "teacher" / "pytorch_model.bin")
    weights.unlink()
    draw = random.Random(0)
    rows = ["".join(draw.choices("abcdefghij 0123456789", k=80)) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return (
        f"model.path={gguf}",
        f"objective.teacher={folder / 'teacher'}",
        f"data.path={folder / 'text.jsonl'}",
    )


def test_every_stage(named: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path) -> None:
    run, gguf = tmp_path / "run", named[0].partition("=")[2]
    outcome = cli(*RUN, *named, "trainer.max_steps=2", f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "summary.json").read_text())["model"]["name"] == gguf
    # An ordinary directory, which needs no gguf.
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert exported.config.num_key_value_heads == 1
    assert "quantization_config" not in (run / "export" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(run / "export")("a 12")["input_ids"]
    again = tmp_path / "again"
    outcome = cli(
        *RUN,
        *named,
        "stages=[plan,operate,train,report]",
        "trainer.max_steps=3",
        f"resume={run / 'checkpoints' / 'last.ckpt'}",
        f"hydra.run.dir={again}",
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((again / "summary.json").read_text())["training"]["steps"] == 3
