"""Each mode of `tasks`, from the command line, on a small model and two small texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.config.schema import Combine, Part
from surgery.data.parts import extract_part
from surgery.errors import SurgeryError
from surgery.importance import ScoreTable
from surgery.lab.tasks import OutputProjections, combine_scores
from surgery.lab.tasks.agreement import correlate_tasks
from surgery.models.source import make_byte_tokenizer
from tests.integration.summaries import read_summary
from tests.tiny_models import tiny_model

SMALL = (
    "data.seq_len=32",
    "data.batch_size=2",
    "data.val_fraction=0.2",
    "importance.windows=6",
    "importance.batch_size=2",
    "calibration.windows=4",
    "calibration.batch_size=2",
    "measure.windows=6",
    "measure.batch_size=4",
    "measure.prefill_tokens=8",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "trainer.max_steps=3",
    "optim.warmup_steps=1",
    "optim.lr=0.01",
    "trainer.accelerator=cpu",
    "logger=none",
)
TASKS = ("code", "prose")
PRUNE = (
    "attention=[prune_heads]",
    "attention.prune_heads.amount=0.5",
    "attention.prune_heads.estimator=gate_gradient",
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 heads and as many KV heads in 2 layers, and two texts."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = make_byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_key_value_heads=4)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    for part in (Part.code, Part.prose):
        (folder / f"{part.value}.txt").write_text(str(extract_part(source, part))[:20_000])
    return folder


@pytest.fixture
def tasks(here: Path, cli: Callable[..., Any]) -> Callable[..., Any]:
    each = ",".join(f"{name}:{{kind:text,path:{here}/{name}.txt}}" for name in TASKS)

    def run(*overrides: str) -> Any:
        return cli(
            f"model.path={here / 'model'}",
            "data=text",
            f"data.path={here}/code.txt",
            *SMALL,
            f"tasks.data={{{each}}}",
            *overrides,
        )

    return run


def results(run: Path) -> dict[str, Any]:
    """`tasks.json`, checked against the summary and its schema."""
    found = json.loads((run / "tasks.json").read_text())
    assert read_summary(run)["tasks"] == found
    assert found["names"] == list(TASKS)
    assert (run / "tasks.png").stat().st_size > 1000
    return found


def table_of(run: Path, name: str) -> ScoreTable:
    assert (run / f"importance-{name}.parquet").is_file()
    return ScoreTable.from_json(json.loads((run / f"importance-{name}.json").read_text()))


def test_compare(tasks: Callable[..., Any], tmp_path: Path, here: Path) -> None:
    outcome = tasks("stages=[plan,score,report]", "tasks.hurts=0", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path)
    tables = {name: table_of(tmp_path, name) for name in TASKS}
    assert [table.data for table in tables.values()] == list(TASKS)
    assert found["spearman"] == correlate_tasks(tables)
    for name, table in tables.items():  # one head of each layer's four is the default
        assert found["masks"][name] == {
            str(site.layer): [site.scores.index(min(site.scores))]
            for site in table.get_scores("heads")
        }
    for name, other in (TASKS, TASKS[::-1]):
        only = {(int(layer), heads[0]) for layer, heads in found["masks"][other].items()} - {
            (int(layer), heads[0]) for layer, heads in found["masks"][name].items()
        }
        assert found["only"][name] == sorted(map(list, only))
    plain = found["losses"].pop("no mask")
    harms = {(m, t): found["losses"][m][t] - plain[t] for m in TASKS for t in TASKS if m != t}
    said = {(one["mask"], one["task"]): one["cost"] for one in found["hurts"]}
    assert said == pytest.approx({pair: cost for pair, cost in harms.items() if cost > 0})
    assert outcome.out.count("WARNING: the mask for") == len(said)
    assert "Rank correlation of gate_gradient scores" in outcome.out
    # A mask is the model without these heads.
    pruned = tmp_path / "pruned"
    outcome = tasks(
        "attention=[prune_heads]",
        "attention.prune_heads.amount=null",
        "tasks.data=null",
        f"attention.prune_heads.heads={json.dumps(found['masks']['prose']).replace(chr(34), '')}",
        "stages=[measure,operate]",
        f"data.path={here}/code.txt",
        f"hydra.run.dir={pruned}",
    )
    assert outcome.code == 0, outcome.err
    summary = json.loads((pruned / "summary.json").read_text())
    assert summary["tasks"] is None
    assert summary["before"]["loss"] == pytest.approx(plain["code"], abs=1e-6)
    assert summary["after_surgery"]["loss"] == pytest.approx(
        found["losses"]["prose"]["code"], abs=1e-5
    )


def test_prune_each(tasks: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tasks(*PRUNE, "tasks.mode=prune_each", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path)
    assert list(found["losses"]) == ["original", *TASKS]
    for name in TASKS:
        own = json.loads((tmp_path / "tasks" / name / "summary.json").read_text())
        assert own["training"]["data"].endswith(f"{name}.txt")
        # What was measured on the model in memory is what the export gives.
        assert found["losses"][name][name] == pytest.approx(own["after_training"]["loss"], abs=1e-5)
        assert found["losses"]["original"][name] == pytest.approx(own["before"]["loss"], abs=1e-5)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / found["files"][name])
        assert {site.q_heads for site in surgery.find_sites(model).sites} == {2}
        assert AutoTokenizer.from_pretrained(tmp_path / found["files"][name]) is not None
        assert (tmp_path / "tasks" / name / "checkpoints" / "last.ckpt").is_file()
    assert not (tmp_path / "checkpoints").exists()
    assert "Held-out loss of each task's pruned model" in outcome.out


def test_output_projections(tasks: Callable[..., Any], tmp_path: Path, here: Path) -> None:
    outcome = tasks(
        "tasks.mode=output_projections",
        "optim.parameters=output",
        "stages=[plan,measure,train,report]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    found = results(tmp_path)
    assert list(found["losses"]) == ["base", *TASKS]
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    ids = torch.arange(3, 20)[None]
    before = base(input_ids=ids).logits
    projections = OutputProjections(base)
    for name in TASKS:
        own = json.loads((tmp_path / "tasks" / name / "summary.json").read_text())
        assert own["training"]["parameters"] == "output"
        file = tmp_path / found["files"][name]
        tensors = load_file(file)
        assert sorted(tensors) == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)]
        assert own["training"]["trainable_parameters"] == sum(t.numel() for t in tensors.values())
        assert found["losses"][name][name] == pytest.approx(own["after_training"]["loss"], abs=1e-5)
        assert found["losses"]["base"][name] == pytest.approx(own["before"]["loss"], abs=1e-5)
        assert found["losses"][name][name] < found["losses"]["base"][name]
        projections.add(name, file)
        projections.use(name)
        assert not torch.equal(base(input_ids=ids).logits, before)
    projections.use(None)
    assert torch.equal(base(input_ids=ids).logits, before)
    with pytest.raises(SurgeryError, match="another base"):
        OutputProjections(tiny_model("llama")).add("code", tmp_path / found["files"]["code"])


@pytest.mark.parametrize(
    "how", [(), ("tasks.combine=weighted", "tasks.weights={code:3,prose:1}")], ids=["worst", "mean"]
)
def test_one_mask(tasks: Callable[..., Any], tmp_path: Path, how: tuple[str, ...]) -> None:
    outcome = tasks(*PRUNE, *how, "tasks.mode=one_mask", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path)
    assert list(found["losses"]) == ["before", "after_surgery", "after_training"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for moment, losses in found["losses"].items():
        assert losses["code"] == pytest.approx(summary[moment]["loss"], abs=1e-6)
    tables = {name: table_of(tmp_path, name) for name in TASKS}
    table = combine_scores(tables, Combine(found["combine"]), found["weights"])
    assert ScoreTable.from_json(json.loads((tmp_path / "importance.json").read_text())) == table
    sites = summary["calibration"]["operations"][0]["sites"]
    for site in table.get_scores("groups"):
        order = sorted(range(4), key=site.scores.__getitem__)
        assert sites[site.site]["removed"] == sorted(order[:2])


def test_a_task_that_cannot_be_leaves_nothing(tasks: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tasks(
        "stages=[plan,score]", "tasks.data.prose.path=gone.txt", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert outcome.code == 2
    assert outcome.err.startswith("error: tasks.data.prose.path: there is no such file")
    assert not (tmp_path / "run").exists()
    outcome = tasks(
        "stages=[plan,score]", "+tasks.data.prose.seq_len=4096", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert outcome.code == 2
    assert outcome.err.startswith("error: tasks.data.prose.seq_len: is more")
    assert not (tmp_path / "run").exists()
