"""Try one generated input in this process, as the product reads it."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from surgery.config.schema import Stage, Task
from surgery.config.validate import check_config
from surgery.data.module import TextData
from surgery.errors import ConfigError, SurgeryError
from surgery.execute.live import apply_
from surgery.importance.score_file import read_scores
from surgery.models.reference import get_shapes
from surgery.pipeline.check import check_run
from surgery.pipeline.prepare import prepare
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import PLAN, load_plan
from tests.data.making import data_config
from tests.hostile.bases import CONFIG, INDEX, PICKLED, ROWS, Bases
from tests.hostile.cases import Case, Damage, change_data, damage_bytes, dump
from tests.models.sources import source
from tests.tiny_models import tiny_model

SUCCESS = "success"


def try_case(case: Case, bases: Bases, folder: Path) -> str:
    """Try a case in an empty folder.

    Returns:
        `SUCCESS`, or the key of the refusal; the kind of error where there is no key.

    Raises:
        Whatever else the product raises: that is a fault.
    """
    refusal = None
    try:
        _TRIES[case.kind](case, bases, folder)
    except SurgeryError as error:
        refusal = error
    if refusal is None:
        return SUCCESS
    assert str(refusal).strip()
    if not isinstance(refusal, ConfigError):
        return type(refusal).__name__
    assert refusal.key.strip()
    assert refusal.problem.strip()
    return refusal.key


def _copy(original: Path, folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    for path in original.iterdir():  # links: only what is changed is written
        os.link(path, model / path.name)
    return model


def _rewrite(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def _use_model(model: Path, base: str) -> None:
    """Read a model directory as a run does: config, plan, weights, tokenizer."""
    task = Task.masked_lm if base == "bert" else Task.causal_lm
    found = source(model, task=task)
    skeleton = found.build_meta_model()
    try:
        make_plan(skeleton, parse_operations({"gqa": {"kv_heads": 1}}))
    finally:
        found.load_tokenizer()
    found.load()


def _try_config(case: Case, bases: Bases, folder: Path) -> None:
    model = _copy(bases.models[case.base], folder)
    config = json.loads((model / CONFIG).read_text())
    if isinstance(case.changes, dict):
        config |= case.changes
    else:
        config = change_data(config, case.changes)
    _rewrite(model / CONFIG, dump(config))
    _use_model(model, case.base)


def _try_file(case: Case, bases: Bases, folder: Path) -> None:
    model = _copy(bases.models[case.base], folder)
    name, damages = case.changes
    if (model / name).is_file():
        _rewrite(model / name, damage_bytes((model / name).read_bytes(), damages))
    _use_model(model, case.base)


def _try_index(case: Case, bases: Bases, folder: Path) -> None:
    model = _copy(bases.sharded, folder)
    _rewrite(model / INDEX, _change_text((model / INDEX).read_bytes(), case.changes))
    source(model).load()


def _change_text(content: bytes, changes: Any) -> bytes:
    if isinstance(changes[0], Damage):
        return damage_bytes(content, changes)
    return dump(change_data(json.loads(content), changes)).encode()


def _try_gguf(case: Case, bases: Bases, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(damage_bytes(bases.gguf.read_bytes(), case.changes))
    _use_model(path, case.base)


def _try_pickled(case: Case, bases: Bases, folder: Path) -> None:
    model = _copy(bases.pickled, folder)
    _rewrite(model / PICKLED, damage_bytes((model / PICKLED).read_bytes(), case.changes))
    source(model).load()


def _try_record(case: Case, bases: Bases, folder: Path) -> None:
    model = _copy(bases.recorded[case.base], folder)
    config = json.loads((model / CONFIG).read_text())
    config["quantization_config"] = change_data(config["quantization_config"], case.changes)
    _rewrite(model / CONFIG, dump(config))
    found = source(model)
    found.build_meta_model()
    found.load()


def _try_plan(case: Case, bases: Bases, folder: Path) -> None:
    (folder / PLAN).write_text(dump(change_data(bases.plans[case.base], case.changes)))
    plan = load_plan(folder)
    plan.to_json()
    model = tiny_model("llama")
    before = get_shapes(model), {n: p.clone() for n, p in model.named_parameters()}
    try:
        apply_(model, plan)
    except SurgeryError:
        # Refused, and nothing is changed.
        assert get_shapes(model) == before[0]
        now = dict(model.named_parameters())
        assert all(torch.equal(tensor, now[name]) for name, tensor in before[1].items())
        raise


def _try_scores(case: Case, bases: Bases, folder: Path) -> None:
    path = folder / f"scores.{case.base}"
    if case.base == "json":
        path.write_bytes(_change_text(dump(bases.scores).encode(), case.changes))
    else:
        lines = [
            {"layer": layer, "unit": "heads", "index": index, "score": 1.0}
            for layer in range(2)
            for index in range(4)
        ]
        _write_parquet(path, lines, case.changes)
    found = read_scores(str(path), bases.sites, "attention.prune_heads.scores")
    assert found.heads is not None
    assert all(math.isfinite(score) for row in found.heads.values() for score in row)


def _write_parquet(path: Path, rows: Any, changes: Any) -> None:
    damaged = isinstance(changes[0], Damage)
    changed = rows if damaged else change_data(rows, changes)
    try:
        pq.write_table(pa.Table.from_pylist(changed), path)
    except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError, KeyError):
        path.write_bytes(dump(changed).encode("utf-8", "replace"))  # no table can hold that
    if damaged:
        path.write_bytes(damage_bytes(path.read_bytes(), changes))


def _try_rows(case: Case, bases: Bases, folder: Path) -> None:
    path = folder / case.base
    if path.suffix == ".parquet":
        _write_parquet(path, ROWS, case.changes)
    else:
        rows: Any = ROWS
        damages = isinstance(case.changes[0], Damage)
        if not damages:
            rows = change_data(ROWS, case.changes)
        rows = rows if isinstance(rows, list) else [rows]
        if path.suffix == ".json":
            text = dump(rows)
        elif path.suffix == ".jsonl":
            text = "".join(f"{dump(row)}\n" for row in rows)
        else:
            text = "\n\n".join(str(row) for row in rows)
        content = text.encode("utf-8", "surrogatepass")
        path.write_bytes(damage_bytes(content, case.changes) if damages else content)
    cfg = data_config(path=str(path), val_fraction=0.3)
    data = TextData(cfg, bases.tokenizer, Task.causal_lm, seed=0)
    data.setup()
    data.check_training()
    next(iter(data.load_held_out_batches(2, 2)))


def _try_overrides(case: Case, bases: Bases, folder: Path) -> None:
    cfg = bases.run.copy()
    try:
        with open_dict(cfg):
            for number, value in case.changes:
                OmegaConf.update(cfg, bases.keys[number % len(bases.keys)], value, merge=False)
            cfg.run_dir = str(folder)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError("override", str(error) or "OmegaConf refuses it") from None
    run = check_config(cfg)
    operations = check_run(run)
    if set(run.stages) - {Stage.plan, Stage.operate, Stage.export}:
        return  # data and weights are tried elsewhere
    prepare(replace(run, stages=[Stage.plan]), folder, {}, operations, {})


def _try_line(case: Case, bases: Bases, folder: Path) -> None:
    """A whole command line, as it is typed; only the refusal before any work."""
    from surgery.cli import main

    number, text = case.changes
    overrides = [
        "+recipe=gqa_convert",
        f"model.path={bases.models['llama']}",
        "attention.gqa.kv_heads=1",
        "stages=[plan]",
        f"hydra.run.dir={folder / 'run'}",
        f"{bases.keys[number % len(bases.keys)]}={text}",
    ]
    said, code = io.StringIO(), 0
    with patch.object(sys, "argv", ["train.py", *overrides]):
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code:
        assert code == 2, said.getvalue()
        assert said.getvalue().startswith("error: "), said.getvalue()
        key = said.getvalue().removeprefix("error: ").split(":")[0].strip()
        raise ConfigError(key, "refused")


_TRIES: dict[str, Callable[[Case, Bases, Path], None]] = {
    "config": _try_config,
    "file": _try_file,
    "index": _try_index,
    "gguf": _try_gguf,
    "pickled": _try_pickled,
    "record": _try_record,
    "plan": _try_plan,
    "scores": _try_scores,
    "rows": _try_rows,
    "overrides": _try_overrides,
    "line": _try_line,
}


def empty(folder: Path) -> Path:
    """Make the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
