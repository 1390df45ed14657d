"""Every mistake: exit status 2, one message that names the key, no traceback, nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

RECIPE = "+recipe=gqa_convert"


class Bad(NamedTuple):
    """What is typed, and what the message must contain: the key first, then what is valid."""

    overrides: tuple[str, ...]
    says: tuple[str, ...]


TABLE = {
    # recipes
    "recipe typo": Bad(("+recipe=gqa_covnert",), ("recipe:", "gqa_covnert", "gqa_convert")),
    "recipe empty": Bad(("+recipe=",), ("recipe:", "gqa_convert", "pretrain_tiny")),
    "recipe key typo": Bad(("+recipie=gqa_convert",), ("recipie: unknown key", "attention")),
    "recipe without plus": Bad(("recipe=gqa_convert",), ("recipe", "+recipe=gqa_convert")),
    # keys
    "unknown top key": Bad((RECIPE, "nonsense=1"), ("nonsense: unknown key", "attention")),
    "unknown top key, added": Bad((RECIPE, "+nonsense=1"), ("nonsense: unknown key", "attention")),
    "unknown model key": Bad((RECIPE, "model.pth=x"), ("model.pth: unknown key", "path")),
    "unknown model key, added": Bad((RECIPE, "+model.pth=x"), ("model.pth: unknown key", "path")),
    "unknown data key": Bad((RECIPE, "+data.window=4"), ("data.window: unknown key", "seq_len")),
    "unknown trainer key": Bad((RECIPE, "+trainer.maxsteps=5"), ("trainer.maxsteps", "max_steps")),
    "trainer key that is ours": Bad((RECIPE, "+trainer.logger=true"), ("trainer.logger",)),
    "unknown operation": Bad((RECIPE, "+attention.gqqa.kv_heads=1"), ("attention.gqqa", "gqa")),
    "unknown option": Bad(
        (RECIPE, "+attention.gqa.kvheads=2"), ("attention.gqa.kvheads: unknown key", "kv_heads")
    ),
    "misspelt option": Bad(
        (RECIPE, "attention.gqa.kvheads=2"), ("attention.gqa.kvheads: unknown key", "kv_heads")
    ),
    "unknown callback option": Bad(
        (RECIPE, "+callbacks.head_importance.every=2"), ("callbacks.head_importance", "every")
    ),
    # choices
    "no such data": Bad((RECIPE, "data=nosuch"), ("data:", "nosuch", "hub, self, stdlib, text")),
    "a number for a choice": Bad((RECIPE, "objective=5"), ("objective:", "5", "distill", "lm")),
    "numbers for choices": Bad((RECIPE, "trainer=[1]"), ("trainer: there is no", "[1]", "fsdp")),
    "a number among choices": Bad(("attention=[gqa,5]",), ("attention", "5", "gqa", "mqa")),
    "null for a choice": Bad((RECIPE, "objective=null"), ("objective",)),
    "no such variant": Bad((RECIPE, "attention=[gqa,rop]"), ("attention:", "rop", "gqa", "mqa")),
    "no such objective": Bad(
        (RECIPE, "objective=kd"), ("objective:", "kd", "distill, distill_attention, lm")
    ),
    "no such stage": Bad((RECIPE, "stages=[operat]"), ("stages[0]", "operat", "operate")),
    "no such merge": Bad(
        (RECIPE, "attention.gqa.merge=average"), ("attention.gqa.merge", "mean, first, random")
    ),
    "no such logger": Bad((RECIPE, "logger.kinds=[mlflow]"), ("logger.kinds", "mlflow", "csv")),
    "no such export format": Bad(
        (RECIPE, "export.format=gguf"), ("export.format", "gguf", "auto, native")
    ),
    # calibration
    "calibrated on nothing": Bad(
        (RECIPE, "calibration.windows=0"), ("calibration.windows", "must be at least 1")
    ),
    "steps below zero": Bad(
        (RECIPE, "calibration.refine_steps=-1"), ("calibration.refine_steps", "must be at least 0")
    ),
    "ridge of none": Bad((RECIPE, "calibration.ridge=0"), ("calibration.ridge", "must be above 0")),
    "unknown calibration key": Bad(
        (RECIPE, "calibration.window=8"), ("calibration.window: unknown key", "windows")
    ),
    # plan
    "sizes at no length": Bad((RECIPE, "plan.tokens=0"), ("plan.tokens: must be at least 1",)),
    # types
    "heads in words": Bad(
        (RECIPE, "attention.gqa.kv_heads=many"), ("attention.gqa.kv_heads", "many", "whole number")
    ),
    "length in words": Bad((RECIPE, "data.seq_len=long"), ("data.seq_len", "long", "Integer")),
    "rate in words": Bad((RECIPE, "optim.lr=fast"), ("optim.lr", "fast", "Float")),
    "operation without options": Bad((RECIPE, "attention.gqa=2"), ("attention.gqa", "2")),
    "a number for a group": Bad(
        (RECIPE, "validation=5"), ("validation: must be a group of keys", "5", "windows, keep")
    ),
    "a word for a group of a group": Bad(
        (RECIPE, "analysis.maps=x"), ("analysis.maps: must be a group of keys", "x", "heads, texts")
    ),
    "null for a group": Bad((RECIPE, "export=null"), ("export: must be a group of keys", "None")),
    "a list for a group": Bad(
        (RECIPE, "measure=[1]"), ("measure: must be a group of keys", "[1]", "windows, batch_size")
    ),
    "a group of keys for a list": Bad(
        (RECIPE, "stages={{a: 1}}"), ("stages: must be no group of keys", "{a: 1}", "a list")
    ),
    "a group of keys for a list of layers": Bad(
        (RECIPE, "attention.gqa.layers={{a: 1}}"),
        ("attention.gqa.layers: must be a list", "'a': 1"),
    ),
    # ranges
    "rate below zero": Bad((RECIPE, "optim.lr=-1"), ("optim.lr", "-1.0")),
    "no batch": Bad((RECIPE, "data.batch_size=0"), ("data.batch_size", "0")),
    "three betas": Bad((RECIPE, "optim.betas=[0.9,0.9,0.9]"), ("optim.betas",)),
    "share over one": Bad(
        (RECIPE, "data.val_fraction=2"), ("data.val_fraction", "must be in [0, 1]")
    ),
    "no steps": Bad((RECIPE, "trainer.max_steps=0"), ("trainer.max_steps", "0")),
    "window over positions": Bad((RECIPE, "data.seq_len=4096"), ("data.seq_len", "2 to 2048")),
    "shard of no size": Bad(
        (RECIPE, "export.max_shard_size=big"), ("export.max_shard_size", "5GB")
    ),
    # head counts
    "heads that do not divide": Bad(
        (RECIPE, "attention.gqa.kv_heads=3"), ("attention.gqa.kv_heads", "3", "1, 2, 4, 8")
    ),
    "more heads than there are": Bad(
        (RECIPE, "attention.gqa.kv_heads=16"), ("attention.gqa.kv_heads", "16", "1, 2, 4, 8")
    ),
    "no heads": Bad((RECIPE, "attention.gqa.kv_heads=0"), ("attention.gqa.kv_heads", "1, 2, 4, 8")),
    "heads not said": Bad(("attention=gqa",), ("attention.gqa.kv_heads", "required")),
    "no such layer": Bad((RECIPE, "attention.gqa.layers=[7]"), ("attention.gqa.layers", "0 to 3")),
    "one number per layer": Bad(
        (RECIPE, "attention.gqa.kv_heads=[2,4]"), ("attention.gqa.kv_heads", "2 numbers for 4")
    ),
    "option of what is not declared": Bad(
        (RECIPE, "attention.fuse_qkv.keep=true"), ("attention.fuse_qkv.keep", "not among those")
    ),
    # healing
    "attention to match without a teacher": Bad(
        (RECIPE, "objective.attention_weight=0.5"),
        ("objective.attention_weight", "0.5", "objective=distill"),
    ),
    "attention matched the wrong way": Bad(
        (RECIPE, "objective=distill", "objective.attention_weight=-1"),
        ("objective.attention_weight: must be at least 0", "-1.0"),
    ),
    "attention matched without end": Bad(
        (RECIPE, "objective=distill", "objective.attention_weight=inf"),
        ("objective.attention_weight: must be finite", "inf"),
    ),
    "a teacher without lessons": Bad(
        (RECIPE, "objective.teacher=embedded"),
        ("objective.teacher: lm learns from the text alone", "objective=distill"),
    ),
    "no such teacher": Bad(
        (RECIPE, "objective=distill", "objective.teacher=/no/where"),
        ("objective.teacher: there is no such directory", "/no/where", "embedded"),
    ),
    "a teacher without weights": Bad(
        (RECIPE, "objective=distill", "objective.teacher={weightless}"),
        ("objective.teacher: the directory has no weights", "*.safetensors"),
    ),
    "a teacher of another vocabulary": Bad(
        (RECIPE, "objective=distill", "objective.teacher={stranger}"),
        ("objective.teacher: predicts 300 tokens, but the model 259", "the same vocabulary"),
    ),
    "a teacher of other tokens": Bad(
        (RECIPE, "objective=distill", "objective.teacher={foreign}"),
        ("objective.teacher: was trained on other tokens", "0 is '<pad>' here, and 'w0' there"),
    ),
    "a teacher with fewer positions": Bad(
        (RECIPE, "objective=distill", "objective.teacher={near}"),
        ("objective.teacher: has 64 positions", "data.seq_len of at most 64"),
    ),
    "a teacher with other blocks": Bad(
        (RECIPE, "objective=distill_attention", "objective.teacher={halved}", "data.seq_len=64"),
        ("objective.attention_weight", "4 in the model, 2 in the teacher"),
    ),
    "a narrow teacher": Bad(
        (RECIPE, "objective=distill_attention", "objective.teacher={narrow}", "data.seq_len=64"),
        ("objective.attention_weight", "another width", "32 and 256"),
    ),
    "oneself as a teacher": Bad(
        ("objective=distill",), ("objective.teacher: the model would learn from itself",)
    ),
    "oneself as a teacher, by name": Bad(
        ("objective=distill_attention", "objective.teacher=embedded"),
        ("objective.teacher: the model would learn from itself", "embedded"),
    ),
    "a recipe without its teacher": Bad(
        ("+recipe=heal_distill", "model.path=embedded"), ("objective.teacher", "learn from itself")
    ),
    "a recipe without its model": Bad(("+recipe=heal_lm",), ("model.path: no model is named",)),
    "no such parameters": Bad(
        (RECIPE, "optim.parameters=some"), ("optim.parameters", "some", "all, attention, changed")
    ),
    "nothing changed": Bad(
        ("optim.parameters=changed",),
        ("optim.parameters: no operation of this run changes a tensor", "all, attention"),
    ),
    "nothing changed but positions": Bad(
        ("+recipe=rope_extend", "optim.parameters=changed"), ("optim.parameters", "changed")
    ),
    "changed and unchanged in one": Bad(
        (RECIPE, "attention=[gqa,fuse_qkv]", "optim.parameters=changed"),
        (
            "optim.parameters: fuse_qkv joins model.layers.0.self_attn.q_proj.weight with others",
            "without fuse_qkv",
        ),
    ),
    # models
    "no attention": Bad((RECIPE, "model.path={mamba}", "stages=[plan]"), ("attention", "Mamba")),
    "latent attention": Bad(
        (RECIPE, "model.path={latent}", "stages=[plan]"), ("attention", "kv_a_proj_with_mqa")
    ),
    "no such directory": Bad((RECIPE, "model.path=/no/where"), ("model.path", "/no/where")),
    "no such hub id": Bad((RECIPE, "model.path=no/where"), ("model.path", "no/where")),
    "from scratch without a tokenizer": Bad(
        ("model=tiny_llama", "model.tokenizer=null"),
        ("model.tokenizer: a model from model.scratch brings no tokenizer", "`bytes`"),
    ),
    "a file": Bad((RECIPE, "model.path={file}"), ("model.path", "not a model directory")),
    "revision of a directory": Bad((RECIPE, "model.revision=main"), ("model.revision", "main")),
    "no config": Bad((RECIPE, "model.path={folder}"), ("model.path", "config.json")),
    "no weights": Bad((RECIPE, "model.path={weightless}"), ("model.path", "no weights")),
    "a damaged pickle": Bad(
        (RECIPE, "model.path={pickled}"),
        ("model.path: cannot be loaded: pytorch_model.bin does not hold tensors alone",),
    ),
    "a damaged GGUF": Bad((RECIPE, "model.path={gguf}"), ("model.path: is no whole GGUF file",)),
    "a GGUF that is not there": Bad(
        (RECIPE, "model.path=no.gguf"), ("model.path: there is no such file", "no.gguf")
    ),
    "a task it has not": Bad((RECIPE, "model.task=masked_lm"), ("model.task", "llama")),
    "a device it has not": Bad((RECIPE, "model.device=cuda:99"), ("model.device", "cuda:99")),
    "a tokenizer of more tokens": Bad(
        (RECIPE, "model.path={near}", "model.tokenizer={wordy}", "data.seq_len=64"),
        ("model.tokenizer: has 260 tokens, but the model embeds 259",),
    ),
    "no such tokenizer": Bad((RECIPE, "model.tokenizer=/no/where"), ("model.tokenizer",)),
    # data
    "no data named": Bad((RECIPE, "data=text"), ("data.path", "required")),
    "no such file": Bad((RECIPE, "data=text", "data.path=/no.txt"), ("data.path", "/no.txt")),
    "empty file": Bad((RECIPE, "data=text", "data.path={empty}"), ("data.path", "empty")),
    "blank file": Bad((RECIPE, "data=text", "data.path={blank}"), ("data.path",)),
    "too short": Bad((RECIPE, "data=text", "data.path={short}"), ("data.", "shorter than one")),
    "unknown type": Bad((RECIPE, "data=text", "data.path={csv}"), ("data.path", ".jsonl")),
    "broken file": Bad(
        (RECIPE, "data=text", "data.path={broken}"), ("data.path", "cannot be read")
    ),
    "no text column": Bad(
        (RECIPE, "data=text", "data.path={columns}"), ("data.text_column", "valid: body")
    ),
    "no such data set": Bad((RECIPE, "data=hub", "data.path=no/where"), ("data.path",)),
    # the run
    "online without login": Bad((RECIPE, "logger.mode=online"), ("logger.mode", "wandb login")),
    "declared, not performed": Bad((RECIPE, "stages=[train]"), ("stages", "operate")),
    "DeepSpeed without CUDA": Bad(
        (RECIPE, "trainer.accelerator=cpu", "trainer.strategy=deepspeed"),
        ("trainer.strategy: DeepSpeed", "ddp"),
    ),
    "nothing to do": Bad((RECIPE, "stages=[]"), ("stages",)),
    "nothing to report": Bad(("stages=[report]",), ("hydra.run.dir", "summary.json")),
    "no such checkpoint": Bad((RECIPE, "resume=/no.ckpt"), ("resume", "/no.ckpt")),
    "not a callback": Bad(
        (RECIPE, "+callbacks.x={{_target_: collections.OrderedDict}}"), ("callbacks.x",)
    ),
    "cadence of zero": Bad(
        (RECIPE, "callbacks.head_importance.every_n_steps=0"), ("every_n_steps", "at least 1")
    ),
    "precision that is none": Bad((RECIPE, "trainer.precision=99"), ("trainer", "99")),
    "devices in words": Bad((RECIPE, "trainer.devices=many"), ("trainer", "devices")),
    "broken override": Bad((RECIPE, "a b"), ("a b",)),
    "reference to nothing": Bad((RECIPE, "data.path=${{nope}}"), ("data.path", "nope")),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories and files with something wrong, by the name the table uses."""
    root = tmp_path_factory.mktemp("places")
    configs = {
        "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
        "latent": {"model_type": "deepseek_v3", "hidden_size": 32, "num_hidden_layers": 2},
        "weightless": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
        },
    }
    configs["pickled"] = configs["weightless"]
    near = {**configs["weightless"], "vocab_size": 259, "max_position_embeddings": 64}
    teachers = {
        "foreign": {**near, "max_position_embeddings": 2048},
        "stranger": configs["weightless"],
        "near": near,
        "halved": near,
        "narrow": {**near, "num_hidden_layers": 4},
    }
    configs |= teachers
    for name, config in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"vocab_size": 300, **config}))
    for name in teachers:
        # Only the header is read.
        save_file({"lm_head.weight": torch.zeros(1)}, root / name / "model.safetensors")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"not a pickle of tensors")
    for name, size in {"foreign": 259, "wordy": 260}.items():
        words = WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(root / name)
    (root / "folder").mkdir()
    files = {
        "file": ("file", "x"),
        "empty": ("empty.txt", ""),
        "blank": ("blank.txt", "\n\n \n"),
        "short": ("short.txt", "hi"),
        "csv": ("table.csv", "a,b\n1,2\n"),
        "gguf": ("model.gguf", "no GGUF at all"),
        "broken": ("broken.jsonl", '{"text": "a'),
        "columns": ("columns.jsonl", '{"body": "text"}\n' * 20),
    }
    for _, (file, text) in files.items():
        (root / file).write_text(text)
    return {name: root / name for name in (*configs, "folder", "wordy")} | {
        name: root / file for name, (file, _) in files.items()
    }


@pytest.mark.parametrize("name", TABLE)
def test_one_clear_message(
    name: str,
    places: dict[str, Path],
    cli: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    bad = TABLE[name]
    run_dir = tmp_path / "run"
    overrides = [o.format_map(places) if "{" in o else o for o in bad.overrides]
    outcome = cli(*overrides, f"hydra.run.dir={run_dir}")
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    for part in bad.says:
        assert part in outcome.err
    assert not run_dir.exists()


@pytest.mark.parametrize("place", ["{file}/run", "/proc/run"])
def test_output_directory_that_cannot_be_made(
    place: str, places: dict[str, Path], cli: Callable[..., object]
) -> None:
    outcome = cli(RECIPE, f"hydra.run.dir={place.format_map(places)}")
    assert outcome.code == 2
    assert outcome.err.startswith("error: hydra.run.dir: cannot be made")


def test_as_a_process(process: Callable[..., object], tmp_path: Path) -> None:
    outcome = process("+recipe=gqa_covnert", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("error: recipe: ")
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import sys
from surgery.cli import main
sys.argv = ["train.py", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    heavy = {"torch", "transformers", "pytorch_lightning"} & set(sys.modules)
    sys.exit(f"{stop.code} {sorted(heavy)}")
"""


@pytest.mark.parametrize(
    "mistake", [("+recipe=gqa_covnert",), (RECIPE, "model.pth=x"), (RECIPE, "optim.lr=-1")]
)
def test_a_mistake_of_the_config_alone_is_answered_at_once(
    mistake: tuple[str, ...], tmp_path: Path
) -> None:
    """Not after the seconds that importing torch and transformers takes."""
    command = [sys.executable, "-c", LIGHT, *mistake]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "2 []"
    assert done.stderr.startswith("error: ")


def test_earlier_results_survive_a_mistake(cli: Callable[..., object], tmp_path: Path) -> None:
    """A run directory in use is never cleared, whatever goes wrong in it."""
    (tmp_path / "summary.json").write_text("{}")
    outcome = cli(RECIPE, "attention.gqa.kv_heads=3", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert (tmp_path / "summary.json").read_text() == "{}"
