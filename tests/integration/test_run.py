"""One whole run of the recipe, in a process of its own, and everything it leaves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.lab.report.summary import MOMENTS
from surgery.models.source import find_embedded_dir
from surgery.training.module import SurgeryModule
from surgery.training.rate import compute_batch_share, compute_loss_share

SHORT = (
    "+recipe=gqa_convert",
    "trainer.max_steps=12",
    "data.batch_size=4",
    "data.seq_len=128",
    "plan.tokens=300",
    "measure.windows=16",
    "measure.prefill_tokens=64",
    "measure.decode_tokens=4",
    "measure.repeats=1",
    "report.new_tokens=3",
    "calibration.windows=8",
    "calibration.refine_steps=4",
    "calibration.joint_steps=2",
    "callbacks.checkpoint.every_n_train_steps=6",
    "callbacks.checkpoint.save_top_k=-1",
    "logger=all",
)


@pytest.fixture(scope="module")
def run(process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("run")
    outcome = process(*SHORT, f"hydra.run.dir={where}", cwd=where)
    assert outcome.code == 0, outcome.err
    (where / "stdout").write_text(outcome.out)
    (where / "stderr").write_text(outcome.err)
    return where


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_leaves_what_is_promised(run: Path) -> None:
    for name in (
        "plan.json",
        "summary.json",
        "summary.schema.json",
        "config.yaml",
        "result.png",
        "heads.parquet",
        "metrics.csv",
        "export/config.json",
        "export/model.safetensors",
        "export/tokenizer_config.json",
        "export/README.md",
        "export/surgery.json",
        "checkpoints/last.ckpt",
        ".hydra/config.yaml",
        "wandb",
        "tensorboard",
    ):
        assert (run / name).exists(), name
    assert not list(run.rglob("*.partial"))


def test_says_where_it_is_in_plain_lines(run: Path) -> None:
    out = (run / "stdout").read_text()
    for words in (
        "Plan for embedded",
        "== operate",
        "training: step 12/12",
        "== export",
        "Result for embedded",
        "after healing",
        str(run),
    ):
        assert words in out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "Traceback" not in (run / "stderr").read_text()


def test_ends_with_what_a_better_merge_would_have_given(run: Path, summary: dict[str, Any]) -> None:
    before, opened = summary["before"]["loss"], summary["after_surgery"]["loss"]
    would = summary["comparison"]["loss"] - before
    assert would < (opened - before) / 4
    last = [line for line in (run / "stdout").read_text().splitlines() if line.strip()][-4:]
    said = " ".join(" ".join(last).split())
    assert f"merge=optimal would have opened {would:.3f}" in said
    assert "+recipe=gqa_optimal" in said


def test_summary_keeps_to_its_schema(run: Path, summary: dict[str, Any]) -> None:
    schema = json.loads((run / "summary.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(summary, schema)
    broken = {**summary, "before": {**summary["before"], "loss": "low"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_measures_what_the_plan_predicted(run: Path, summary: dict[str, Any]) -> None:
    plan = json.loads((run / "plan.json").read_text())
    assert plan["tokens"] == summary["planned"]["tokens"] == 300
    for moment, planned in (
        ("before", "sizes_before"),
        ("after_surgery", "sizes_after"),
        ("after_training", "sizes_after"),
    ):
        for size, value in plan[planned].items():
            assert summary[moment][size] == value, (moment, size)
        figures = summary[moment]
        assert figures["cache_bytes_per_token"] == figures["kv_bytes_per_token"]
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert (
        summary["after_surgery"]["kv_bytes_per_token"] * 4
        == (summary["before"]["kv_bytes_per_token"])
    )


def test_surgery_opens_a_gap_and_healing_closes_some(summary: dict[str, Any]) -> None:
    before, opened, healed = (
        summary[m]["loss"] for m in ("before", "after_surgery", "after_training")
    )
    assert before < healed < opened
    assert summary["gap_closed"] == pytest.approx((opened - healed) / (opened - before))


def test_composed_config_is_kept(run: Path) -> None:
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["attention"] == {
        "gqa": {
            "kv_heads": 2,
            "merge": "mean",
            "grouping": "contiguous",
            "groups": None,
            "layers": None,
        }
    }
    assert kept["trainer"]["max_steps"] == 12
    assert kept["run_dir"] == str(run)


def test_the_rate_follows_from_what_surgery_cost(run: Path, summary: dict[str, Any]) -> None:
    """And it is said: while planning between which two, then which and why."""
    config, training = yaml.safe_load((run / "config.yaml").read_text()), summary["training"]
    before, opened = summary["before"]["loss"], summary["after_surgery"]["loss"]
    tokens = config["data"]["seq_len"] * config["data"]["batch_size"]
    share = compute_loss_share(before, opened) * compute_batch_share(tokens)
    assert config["optim"]["lr"] is None
    assert training["lr"] == pytest.approx(share * 0.75 / 256)
    assert training["rate"] == {
        "share": pytest.approx(share),
        "reason": f"surgery moved the held-out loss from {before:.4f} to {opened:.4f}; "
        f"{tokens:,} tokens a step",
    }
    shown = (run / "stdout").read_text()
    assert "the higher the more surgery costs (optim.lr: null)" in shown
    assert shown.count(f"learning rate {training['lr']:.3g}, ") == 2  # the log, the table


def test_it_writes_on_at_every_moment(run: Path, summary: dict[str, Any]) -> None:
    samples = summary["samples"]
    assert (samples["new_tokens"], samples["problems"], len(samples["texts"])) == (3, {}, 3)
    for entry in samples["texts"]:
        assert len(entry["prompt"].strip()) > 10
        assert all(len(entry[moment]) <= 3 for moment in MOMENTS)


def test_heads_table_has_every_head(run: Path, summary: dict[str, Any]) -> None:
    assert summary["training"]["heads"] == "heads.parquet"
    table = pq.read_table(run / "heads.parquet").to_pydict()
    seen = set(zip(table["step"], table["layer"], table["head"], strict=True))
    assert seen == {(s, layer, h) for s in (0, 10) for layer in range(4) for h in range(8)}
    assert all(0 <= share <= 1 for share in table["normalized_entropy"])
    assert all(value > 0 for value in table["head_importance"])


def test_export_loads_without_this_project(run: Path) -> None:
    """A fresh process that never imports `surgery` gives the live model's logits."""
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('def f(x):', return_tensors='pt')\n"
        "logits = model(input_ids=ids['input_ids']).logits\n"
        "assert not any(name.split('.')[0] == 'surgery' for name in sys.modules)\n"
        "torch.save(logits.detach(), sys.argv[2])\n"
    )
    logits_file = run / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", script, str(run / "export"), str(logits_file)],
        cwd=run,
        check=True,
        timeout=120,
    )
    there = torch.load(logits_file, weights_only=True)
    module = SurgeryModule.load_from_checkpoint(run / "checkpoints/last.ckpt", map_location="cpu")
    ids = AutoTokenizer.from_pretrained(run / "export")("def f(x):", return_tensors="pt")
    assert module.model is not None
    with torch.no_grad():
        live = module.model.eval()(input_ids=ids["input_ids"]).logits
    assert (live - there).abs().max() <= 1e-6
    assert module.model.config.num_key_value_heads == 2


def test_export_generates_and_can_be_operated_on_again(
    run: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer("import ", return_tensors="pt", add_special_tokens=False)
    text = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 15)
    outcome = cli(
        "attention=mqa",
        f"model.path={run / 'export'}",
        "stages=[plan,operate,export]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert again.config.num_key_value_heads == 1


def test_report_alone_says_the_same_again(run: Path, cli: Callable[..., Any]) -> None:
    before = (run / "summary.json").read_bytes()
    outcome = cli("stages=[report]", f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    assert (run / "summary.json").read_bytes() == before
    shown = (run / "stdout").read_text()
    assert outcome.out.strip().splitlines()[0] in shown
    assert "after healing" in outcome.out


def test_resume_continues_as_if_never_stopped(
    run: Path, summary: dict[str, Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """From the checkpoint of step 6 to 12: the very same losses, and the same final model."""
    resume = (f"resume={run / 'checkpoints/step-6.ckpt'}", "optim.lr=0.5")
    outcome = cli(*SHORT, *resume, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "optim.lr=0.5 is not used: the checkpoint goes on at" in outcome.out
    resumed = json.loads((tmp_path / "summary.json").read_text())
    assert resumed["training"]["curve"] == summary["training"]["curve"]
    assert resumed["after_training"]["loss"] == summary["after_training"]["loss"]
    assert resumed["training"]["lr"] == summary["training"]["lr"]
    assert resumed["training"]["rate"]["reason"] == "the checkpoint to resume from has it"


def test_embedded_model_is_what_its_card_says() -> None:
    folder = find_embedded_dir()
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text()
    for word in ("stdlib", "steps", "seed", "transformers", "Held-out"):
        assert word in card
