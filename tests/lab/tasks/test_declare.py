"""The declared tasks: each its data, and what makes no sense refused with its key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import surgery.hydra  # noqa: F401
from surgery.config.schema import DataConfig, DataKind, Layout, Part, RunConfig
from surgery.config.validate import check_config
from surgery.errors import ConfigError
from surgery.lab.tasks.declare import check_tasks
from surgery.plan.registry import parse_operations

TWO = "tasks.data={code:{part:code},prose:{part:prose}}"
PRUNE = "attention=[prune_heads]"
NAMED = (PRUNE, "attention.prune_heads.heads=[0]")
SCORED = (PRUNE, "attention.prune_heads.amount=0.25", "attention.prune_heads.estimator=random")
SCORE = "stages=[plan,score]"
ONE = (*SCORED, TWO, "tasks.mode=one_mask")
OUT = ("tasks.mode=output_projections", "optim.parameters=output", TWO, "stages=[train]")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("surgery.conf", version_base="1.3"):
        yield


def run_of(*overrides: str) -> RunConfig:
    return check_config(compose("config", overrides=[*overrides, "run_dir=somewhere"]))


def tasks_of(*overrides: str) -> dict[str, DataConfig]:
    run = run_of(*overrides)
    return check_tasks(run, parse_operations(run.attention))


def test_no_tasks() -> None:
    assert tasks_of() == {}


def test_a_task_is_the_runs_data_with_some_keys_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    found = tasks_of(
        SCORE,
        "data.seq_len=64",
        f"tasks.data={{code:{{part:code}},own:{{kind:text,path:{tmp_path}/mine.txt,layout:padded}}}}",
    )
    assert list(found) == ["code", "own"]
    assert (found["code"].kind, found["code"].part) == (DataKind.stdlib, Part.code)
    assert (found["own"].kind, found["own"].path) == (DataKind.text, f"{tmp_path}/mine.txt")
    assert found["own"].layout is Layout.padded
    assert {one.seq_len for one in found.values()} == {64}


@pytest.mark.parametrize(
    "overrides",
    [
        (TWO, SCORE),
        ONE,
        (*ONE, "tasks.combine=weighted", "tasks.weights={code:2,prose:0}"),
        (*SCORED, TWO, "tasks.mode=prune_each"),
        (
            *SCORED,
            TWO,
            "tasks.mode=prune_each",
            "attention.prune_heads.schedule=gradual",
            "stages=[operate,train]",
        ),
        OUT,
    ],
)
def test_what_makes_sense_is_let_through(overrides: tuple[str, ...]) -> None:
    assert list(tasks_of(*overrides)) == ["code", "prose"]


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (("tasks.mode=one_mask",), "tasks.mode", "no tasks"),
        (("tasks.weights={a:1}",), "tasks.weights", "no tasks"),
        (("tasks.data={code:{part:code}}", SCORE), "tasks.data", "at least two tasks"),
        (
            ("tasks.data={code:{part:code},b:prose}", SCORE),
            "tasks.data.b",
            "keys of data that differ",
        ),
        (("tasks.data={a/b:{part:code},b:{}}", SCORE), "tasks.data", "not a valid name"),
        (("tasks.data={base:{part:code},b:{}}", SCORE), "tasks.data", "not a valid name"),
        (("tasks.data={code:{parts:code},b:{}}", SCORE), "tasks.data.code.parts", "unknown key"),
        (("tasks.data={code:{part:nothing},b:{}}", SCORE), "tasks.data.code.part", "nothing"),
        (("tasks.data={code:{seq_len:long},b:{}}", SCORE), "tasks.data.code.seq_len", "long"),
        (("tasks.data={code:{seq_len:1},b:{}}", SCORE), "tasks.data.code.seq_len", "at least 2"),
        (("tasks.data={a:{kind:text,path:none.txt},b:{}}", SCORE), "tasks.data.a.path", "no such"),
        (("tasks.data={a:{kind:text,part:code},b:{}}", SCORE), "tasks.data.a.part", "not used"),
        ((TWO,), "stages", "needs `score`"),
        ((TWO, "tasks.mode=one_mask"), "tasks.mode", "by an estimator"),
        ((*NAMED, TWO, "tasks.mode=prune_each"), "tasks.mode", "by an estimator"),
        ((*ONE, "stages=[operate]"), "stages", "needs `calibrate`"),
        ((*ONE, "stages=[calibrate]"), "stages", "needs `operate`"),
        ((*ONE, "tasks.weights={code:1,prose:1}"), "tasks.weights", "no effect"),
        (
            (TWO, SCORE, "tasks.combine=weighted", "tasks.weights={code:1,prose:1}"),
            "tasks.weights",
            "no effect",
        ),
        (
            (*ONE, "tasks.combine=weighted", "tasks.weights={code:1,other:1}"),
            "tasks.weights.other",
            "no such task",
        ),
        (
            (*ONE, "tasks.combine=weighted", "tasks.weights={code:1}"),
            "tasks.weights.prose",
            "required",
        ),
        (
            (*ONE, "tasks.combine=weighted", "tasks.weights={code:-1,prose:2}"),
            "tasks.weights.code",
            "must be 0 or more",
        ),
        (
            (*ONE, "tasks.combine=weighted", "tasks.weights={code:0,prose:0}"),
            "tasks.weights",
            "must not all be 0",
        ),
        ((*OUT, *SCORED), "attention", "unchanged model"),
        ((*OUT, "optim.parameters=all"), "optim.parameters", "only output projections"),
        ((*OUT, "stages=[measure]"), "stages", "needs `train`"),
        ((*OUT, "stages=[train,export]"), "stages", "nothing to export"),
        ((*OUT, "model=tiny_llama"), "model.scratch", "several times"),
        ((*OUT, "resume=a.ckpt"), "resume", "once per task"),
        ((*OUT, "trainer.devices=2"), "trainer.devices", "one process"),
        ((*OUT, "trainer.strategy=fsdp"), "trainer.strategy", "one process"),
    ],
)
def test_what_makes_none_is_refused(overrides: tuple[str, ...], key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tasks_of(*overrides)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_an_unknown_key_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        tasks_of("tasks.data={code:{parts:code},b:{}}", SCORE)
    assert "part, layout" in str(caught.value.valid)
