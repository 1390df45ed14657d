"""No run ends with a higher loss than it had before healing, at ten times the default rate too."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification as AutoClassifier

from surgery.config.schema import Task
from surgery.config.validate import check_config
from surgery.data.module import TextData
from surgery.measure.loss import measure_held_out_loss
from surgery.models.source import ModelSource
from surgery.training.rate import FULL_RATE
from tests.integration.summaries import read_summary
from tests.integration.test_healing import SHORT
from tests.integration.test_own_model import bert_dir
from tests.integration.test_pruning_schedules import RECIPE, SCHEDULE

AUTO = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.masked_lm: AutoModelForMaskedLM,
    Task.sequence_classification: AutoClassifier,
}
STAGES = "stages=[measure,operate,train,export]"
GQA = ("attention=[gqa]", "attention.gqa.kv_heads=4")
BERT = (f"model.path={bert_dir()}", "data.layout=padded", "attention=[]", "data.seq_len=32")
TENFOLD, BERT_TENFOLD = (f"optim.lr={10 * FULL_RATE / width}" for width in (256, 384))
HARSH = (TENFOLD, "optim.warmup_steps=0")
# Weights that other windows chose may still measure worse; here these chose none.
UNSEEN = "trainer.limit_val_batches=0"

CASES: dict[str, tuple[str, ...]] = {
    "the default rate": GQA,
    "text": (*GQA, *HARSH),
    "attention, few steps each": (
        *GQA,
        *HARSH,
        "objective=distill_attention",
        "optim.parameters=attention",
        "trainer.accumulate_grad_batches=2",
        "validation.every_n_steps=100",
    ),
    "Muon, cast, a stream": (
        *GQA,
        "optim=muon",
        *HARSH,
        "trainer.precision=bf16-true",
        "data.streaming=always",
    ),
    "unseen": (*GQA, *HARSH, UNSEEN),
    # Its loss begins at that of a random head, so only a rate far above does harm.
    "masked tokens": (*BERT, "model.task=masked_lm", "optim.lr=0.5", UNSEEN),
    # Its head is not in the checkpoint.
    "a random classifier": (
        *BERT,
        "model.task=sequence_classification",
        "data.label_column=label",
        BERT_TENFOLD,
        UNSEEN,
    ),
}
WORSE = CASES.keys() - {"the default rate"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Pieces of the standard library's source, which the embedded model knows."""
    folder = tmp_path_factory.mktemp("texts")
    for name, module in (("train", argparse), ("held_out", textwrap)):
        source = Path(module.__file__).read_text(encoding="utf-8")[:24_000]
        pieces = [source[at : at + 400] for at in range(0, len(source), 400)]
        rows = [json.dumps({"text": text, "label": at % 2}) for at, text in enumerate(pieces)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    paths = (f"data.path={folder}/train.jsonl", f"data.val_path={folder}/held_out.jsonl")
    return ("data=text", *paths)


def measure_export(run: Path) -> float:
    """Measure what lies in the export on the windows of the summary's figures."""
    cfg = check_config(OmegaConf.load(run / "config.yaml"))
    task = cfg.model.task
    # No `dtype`: a run at another precision exports that one, and is measured at it.
    model = AUTO[task].from_pretrained(run / "export")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokenizer = ModelSource(cfg.model).load_tokenizer()
    data = TextData(replace(cfg.data), tokenizer, task, cfg.seed)
    return measure_held_out_loss(model.eval(), data, cfg.measure, task, label="export")


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_not_higher_than_before_healing(
    case: str, texts: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path
) -> None:
    run = (STAGES, *SHORT, *texts, "logger=none", "validation.windows=8", "trainer.max_steps=6")
    outcome = cli(*run, *CASES[case], f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    opened = (summary["after_surgery"] or summary["before"])["loss"]
    healed, training = summary["after_training"]["loss"], summary["training"]
    assert healed <= opened * (1 + 1e-6)
    assert measure_export(tmp_path) == pytest.approx(healed, rel=2e-3 if "cast" in case else 1e-5)
    # It is not that these rates do no harm.
    given_up, held_out = training["reverted"], training["held_out"]
    if given_up:
        assert given_up["loss"] > given_up["untrained_loss"] == opened
        assert "healing did not help; the untrained weights are exported" in outcome.out
    if case in WORSE:
        assert given_up or held_out["last_loss"] > held_out["losses"][0][1]
    if UNSEEN in CASES[case]:
        assert given_up


def test_heads_that_close_while_training(cli: Callable[..., Any], tmp_path: Path) -> None:
    """There is no healing before the last one is closed: from there on it must not get worse."""
    harsh = (f"optim.lr={10 * FULL_RATE / 32}", "validation.every_n_steps=1")
    outcome = cli(*RECIPE, f"{SCHEDULE}=gradual", *harsh, STAGES, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    training = read_summary(tmp_path)["training"]
    assert training["reverted"] is None
    held_out = training["held_out"]
    final = {step: loss for step, loss in held_out["losses"] if step >= held_out["first_step"]}
    assert held_out["kept_step"] == min(final, key=final.__getitem__)
