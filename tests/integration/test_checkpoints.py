"""Checkpoints that do not hold what a run is about: said before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertModel

from surgery.models.source import make_byte_tokenizer
from tests.models.sources import with_config

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def test_a_plan_does_not_count_heads_that_are_gone(cli: Callable[..., Any], tmp_path: Path) -> None:
    where = tmp_path / "model"
    BertForMaskedLM(BertConfig(vocab_size=61, **TINY)).save_pretrained(where)
    with_config(pruned_heads={"0": [1]}, hidden_size=24, num_attention_heads=3)(where)
    outcome = cli(
        "stages=[plan]",
        f"model.path={where}",
        "model.task=masked_lm",
        "data.layout=padded",
        "attention=[prune_heads]",
        "attention.prune_heads.heads={1:[0]}",
        "logger=none",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2
    assert "model.path: its config.json has pruned_heads" in outcome.err
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """A model without a head, and rows with classes."""
    where, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    tokenizer = make_byte_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(where)
    tokenizer.save_pretrained(where)
    lines = [{"text": "ab" * (1 + i % 5), "label": i % 2} for i in range(64)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    return where, rows


def run(where: Path, rows: Path, folder: Path, *options: str) -> tuple[str, ...]:
    return (
        f"model.path={where}",
        "model.task=sequence_classification",
        "data=text",
        "data.layout=padded",
        "data.seq_len=16",
        "data.val_fraction=0.25",
        "data.label_column=label",
        f"data.path={rows}",
        "logger=none",
        f"hydra.run.dir={folder}",
        *options,
    )


SCORING = ("stages=[score]", "importance.estimator=gate_gradient", "importance.windows=8")
CALIBRATING = (
    "stages=[plan,calibrate]",
    "attention=[prune_heads]",
    "attention.prune_heads.amount=0.25",
    "attention.prune_heads.estimator=leave_one_out",
)


@pytest.mark.parametrize("options", [SCORING, CALIBRATING])
def test_the_loss_of_a_head_that_nobody_trained_scores_nothing(
    options: tuple[str, ...],
    labelled: tuple[Path, Path],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    outcome = cli(*run(*labelled, tmp_path / "run", *options))
    assert outcome.code == 2
    assert "model.path: classifier.bias is not in the checkpoint, so it is random" in outcome.err
    assert "output_norm, random" in outcome.err
    assert not list((tmp_path / "run").glob("importance*"))


def test_a_head_of_the_checkpoint_is_scored(
    labelled: tuple[Path, Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    where, rows = labelled
    AutoModelForSequenceClassification.from_pretrained(where).save_pretrained(where)
    assert cli(*run(where, rows, tmp_path / "run", *SCORING)).code == 0
    assert (tmp_path / "run" / "importance.json").is_file()
