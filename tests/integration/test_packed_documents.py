"""Packed documents in a run: isolated to the last digit, or refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig, PreTrainedConfig

import surgery.hydra  # noqa: F401  (Hydra finds the groups)
from surgery.config.schema import Layout, RunConfig
from surgery.config.validate import check_config
from surgery.errors import ConfigError
from surgery.models.source import ModelSource, make_byte_tokenizer
from surgery.pipeline.packing import check_packing
from surgery.plan.make import make_plan

WINDOW = 32
SIZES: dict[str, Any] = {"hidden_size": 32, "vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(n_layer=2, n_head=4, **SIZES),
    "opt": OPTConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        **SIZES,
    ),
}
LINES = ["a cat", "it rained over the old town for days", "yes", "no, not at all", "the end"] * 3
QUICK = (
    "data=text",
    "data.sample_by=line",
    f"data.seq_len={WINDOW}",
    "data.batch_size=2",
    "measure.windows=64",
    "measure.prefill_tokens=8",
    "measure.decode_tokens=1",
    "measure.repeats=1",
    "report.prompts=[]",
    "model.attn_implementation=eager",
    "logger=none",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in `bloom` and `opt`, and a text."""
    folder = tmp_path_factory.mktemp("packed")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        make_byte_tokenizer().save_pretrained(folder / name)
    (folder / "lines.txt").write_text("\n".join(LINES))
    return folder


def test_a_model_that_leaks_is_refused(
    folder: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = cli(
        *QUICK,
        f"model.path={folder / 'bloom'}",
        f"data.path={folder / 'lines.txt'}",
        f"hydra.run.dir={run}",
    )
    assert outcome.code == 2
    assert outcome.err.startswith(
        "error: data.isolate_documents: packed documents cannot be kept apart in the model (bloom"
    )
    assert "given: true, with data.layout=packed" in outcome.err
    assert "valid: data.isolate_documents=false" in outcome.err
    assert "data.layout=padded" in outcome.err
    assert not run.exists()


def test_a_teacher_that_leaks_is_refused(
    folder: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        *QUICK,
        f"model.path={folder / 'opt'}",
        f"data.path={folder / 'lines.txt'}",
        "objective=distill",
        f"objective.teacher={folder / 'bloom'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2
    assert "data.isolate_documents: " in outcome.err
    assert "in the teacher (bloom" in outcome.err
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_the_measured_loss_is_that_of_documents_alone(
    folder: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Counted from the text itself: bytes, an end after each line, cut into windows."""
    outcome = cli(
        *QUICK,
        f"model.path={folder / 'opt'}",
        f"data.path={folder / 'lines.txt'}",
        f"data.val_path={folder / 'lines.txt'}",
        "stages=[measure]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    measured = json.loads((tmp_path / "summary.json").read_text())["before"]["loss"]

    model = AutoModelForCausalLM.from_pretrained(folder / "opt")
    losses, place = [], 0
    whole = sum(len(line) + 1 for line in LINES) // WINDOW * WINDOW
    for line in LINES:
        ids = [byte + 3 for byte in line.encode()] + [1]
        while ids:
            piece, ids = ids[: WINDOW - place % WINDOW], ids[WINDOW - place % WINDOW :]
            if place + len(piece) <= whole and len(piece) > 1:
                tokens = torch.tensor(piece)
                logits = model(input_ids=tokens[None]).logits[0, :-1]
                losses.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
            place += len(piece)
    assert measured == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


@pytest.fixture
def hybrid_run() -> Iterator[RunConfig]:
    GlobalHydra.instance().clear()
    kinds = "layer_types:[full_attention,full_attention],num_hidden_layers:2"
    scratch = f"model.scratch={{model_type:qwen3_next,vocab_size:259,{kinds}}}"
    text = ("data=text", "data.path=unread", "run_dir=unused")
    with initialize_config_module("surgery.conf", version_base="1.3"):
        yield check_config(compose("config", overrides=[*text, "model.path=null", scratch]))


def test_the_planned_result_is_asked_too(hybrid_run: RunConfig) -> None:
    """A hybrid without a recurrent layer is isolated, and with one it is not."""
    skeleton = ModelSource(hybrid_run.model).build_meta_model()
    plan = make_plan(skeleton, [])
    check_packing(hybrid_run, hybrid_run.data, skeleton, plan)
    layers = ["linear_attention", "full_attention"]
    changed = replace(plan, config_patch={"layer_types": layers})
    with pytest.raises(ConfigError, match=r"apart in the planned result \(qwen3_next, sdpa\)"):
        check_packing(hybrid_run, hybrid_run.data, skeleton, changed)
    for other in ({"isolate_documents": False}, {"layout": Layout.padded}):
        check_packing(hybrid_run, replace(hybrid_run.data, **other), skeleton, changed)


def test_flash_is_not_asked_and_a_line_says_so(
    hybrid_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(hybrid_run.model, attn_implementation="flash_attention_2")
    skeleton = ModelSource(hybrid_run.model).build_meta_model()
    run = replace(hybrid_run, model=model)
    check_packing(run, run.data, skeleton, make_plan(skeleton, []))
    assert "the model: flash_attention_2 keeps packed documents apart" in capsys.readouterr().out
