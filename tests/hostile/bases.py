"""Whole and valid input of every kind, which the generator damages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.hydra  # noqa: F401
from surgery.execute.live import apply_
from surgery.importance.table import ScoreTable, SiteScores
from surgery.models.sites import Site, find_sites
from surgery.models.source import make_byte_tokenizer
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import PLAN, save_plan
from tests.models.gguf_files import make_llama, write_gguf
from tests.tiny_models import tiny_model

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
FAMILIES = ("llama", "gpt2", "bert", "qwen3")
# Exports in the record format: sizes and attributes, removed blocks, positions, dropout.
RECORDED: dict[str, dict[str, Any]] = {
    "gqa": {"gqa": {"kv_heads": 1, "layers": [0]}},
    "removed": {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}},
    "positions": {"rope": {"type": "yarn", "factor": 2.0, "layers": [1]}},
}
PLANNED: dict[str, dict[str, Any]] = {
    **RECORDED,
    "several": {
        "gqa": {"kv_heads": 1},
        "attention_dropout": {"p": 0.1},
        "fuse_qkv": {},
    },
}
ROWS = [{"text": f"w{number} some text of a row", "label": number % 2} for number in range(40)]


@dataclass(frozen=True)
class Bases:
    """Directories and data that are right, made once.

    Attributes:
        models: name → directory of a model in one file, with its tokenizer.
        sharded: directory of a model in two shards with an index.
        recorded: name → directory of an export with a record.
        gguf: a model in a GGUF file, with its tokenizer.
        pickled: directory of a model in pytorch_model.bin.
        plans: name → plan.json as data.
        model: what the plans are for.
        sites: of that model.
        scores: a score table as data.
        run: a composed config that plans on one of the models.
        keys: every key of it that holds a value.
        tokenizer: for text.
    """

    models: dict[str, Path]
    sharded: Path
    recorded: dict[str, Path]
    gguf: Path
    pickled: Path
    plans: dict[str, Any]
    model: PreTrainedModel
    sites: tuple[Site, ...]
    scores: dict[str, Any]
    run: DictConfig
    keys: list[str]
    tokenizer: PreTrainedTokenizerBase


def make_bases(root: Path) -> Bases:
    """Make them under `root`."""
    models = {}
    for name in FAMILIES:
        models[name] = root / name
        tiny_model(name).float().save_pretrained(models[name])
        make_byte_tokenizer().save_pretrained(models[name])
    recorded = {}
    for name, operations in RECORDED.items():
        model = tiny_model("llama")
        model = apply_(model, make_plan(model, parse_operations(operations)))
        recorded[name] = root / f"recorded-{name}"
        model.save_pretrained(recorded[name])
        make_byte_tokenizer().save_pretrained(recorded[name])
        assert "quantization_config" in json.loads((recorded[name] / CONFIG).read_text())
    model = tiny_model("llama")
    plans = {}
    for name, operations in PLANNED.items():
        folder = root / f"plan-{name}"
        folder.mkdir()
        save_plan(make_plan(model, parse_operations(operations)), folder)
        plans[name] = json.loads((folder / PLAN).read_text())
    sites = find_sites(model).sites
    scores = tuple(
        SiteScores(site.layer, site.path, (1.0, 2.0, 3.0, 4.0), (0.1,) * 4) for site in sites
    )
    run = _compose(models["llama"], root)
    return Bases(
        models=models,
        sharded=_make_sharded(models["llama"], root / "sharded"),
        recorded=recorded,
        gguf=write_gguf(root / "tiny.gguf", make_llama()),
        pickled=_make_pickled(models["llama"], root / "pickled"),
        plans=plans,
        model=model,
        sites=sites,
        scores=ScoreTable("gate_gradient", "lm", scores, None).to_json(),
        run=run,
        keys=sorted(_list_keys(run)),
        tokenizer=make_byte_tokenizer(),
    )


def _make_sharded(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != WEIGHTS:
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(whole / WEIGHTS)
    names = sorted(tensors)
    placed = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "decoy.safetensors").write_bytes(b"")
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def _make_pickled(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != WEIGHTS:
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(whole / WEIGHTS), folder / PICKLED)
    return folder


def _compose(model: Path, root: Path) -> DictConfig:
    overrides = [
        "+recipe=gqa_convert",
        f"model.path={model}",
        "attention.gqa.kv_heads=1",
        "stages=[plan]",
        f"run_dir={root / 'run'}",
    ]
    with initialize_config_module("surgery.conf", version_base="1.3"):
        return compose("config", overrides)


def _list_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        missing = node._get_node(key)._is_missing() or node._is_none()
        value = None if missing else node._get_node(key)
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            keys += _list_keys(value, f"{prefix}{key}.")
    return keys
