"""Learning from another model than the original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from surgery.config.schema import ModelConfig, Task
from surgery.errors import ConfigError
from surgery.models.source import find_embedded_dir
from surgery.training.module import SurgeryModule, parse_section
from surgery.training.objectives import compute_distillation_kl
from surgery.training.teacher import check_teacher_tokens, load_teacher, locate_teacher
from tests.tiny_models import tiny_model
from tests.training.making import Losses, fit, operated, options, save_model, small_data


def _teacher(folder: Path, **fields: Any) -> Path:
    """Other weights than `save_model`'s, another shape too."""
    model = tiny_model("llama", seed=1, max_position_embeddings=4096, num_hidden_layers=3, **fields)
    model.save_pretrained(folder)
    return folder


class Batches(Callback):
    """Keeps what is trained on."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.seen.append(batch)


def _spec(**fields: Any) -> ModelConfig:
    spec = parse_section(ModelConfig, options("model", "embedded", **fields))
    assert isinstance(spec, ModelConfig)
    return spec


def test_the_first_loss_is_the_distance_to_that_model(tmp_path: Path) -> None:
    model, teacher = save_model(tmp_path / "model"), _teacher(tmp_path / "teacher")
    objective = options("objective", "distill", teacher=str(teacher))
    module, losses, batches = operated(model, objective=objective), Losses(), Batches()
    fit(module, small_data(tmp_path), tmp_path, max_steps=3, callbacks=[losses, batches])
    inputs = {name: tensor for name, tensor in batches.seen[0].items() if name != "labels"}
    labels = batches.seen[0]["labels"]
    fresh = operated(model)
    fresh.configure_model()
    assert fresh.model is not None
    with torch.no_grad():
        told = AutoModelForCausalLM.from_pretrained(teacher)(**inputs, use_cache=False).logits
        own = fresh.model(**inputs, use_cache=False).logits
    expected = compute_distillation_kl(own, told, labels, 1.0, Task.causal_lm)
    assert losses.values[0] == pytest.approx(float(expected), rel=1e-5)
    for name, tensor in module._teacher[0].state_dict().items():
        assert torch.equal(
            tensor, AutoModelForCausalLM.from_pretrained(teacher).state_dict()[name]
        ), name
    assert not any(p.requires_grad for p in module._teacher[0].parameters())


def test_a_checkpoint_needs_no_teacher(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher")
    objective = options("objective", "distill", teacher=str(teacher))
    module = operated(save_model(tmp_path / "model"), objective=objective)
    fit(module, small_data(tmp_path), tmp_path, max_steps=1).save_checkpoint(tmp_path / "x.ckpt")
    shutil.rmtree(teacher)
    again = SurgeryModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.objective.teacher == str(teacher)


def test_it_is_loaded_as_the_original_would_be(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher")
    spec = _spec(
        path="no/where",
        revision="main",
        num_labels=3,
        attn_implementation="eager",
        dtype="bfloat16",
    )
    model = load_teacher(spec, str(teacher))
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert locate_teacher(spec, None).spec is spec
    embedded = locate_teacher(spec, "embedded")
    assert embedded.locate() == str(find_embedded_dir())


def test_what_is_wrong_with_it_is_said_under_its_own_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_teacher(_spec(), str(tmp_path / "empty"))
    assert caught.value.key == "objective.teacher"
    assert caught.value.given == str(tmp_path / "empty")
    with pytest.raises(ConfigError) as caught:
        load_teacher(_spec(path=str(tmp_path / "empty")), None)
    assert caught.value.key == "model.path"


def test_its_attention_is_paired_by_those_who_know_it(tmp_path: Path) -> None:
    model, teacher = save_model(tmp_path / "model"), _teacher(tmp_path / "teacher")
    objective = options("objective", "distill_attention", teacher=str(teacher))
    with pytest.raises(ConfigError, match="pairs"):
        operated(model, objective=objective)
    last = "model.layers.{}.self_attn.o_proj"
    pairs = [[last.format(0), last.format(0)], [last.format(1), last.format(2)]]
    module = operated(model, objective=objective, pairs=pairs)
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    assert float(trainer.callback_metrics["train/attention"]) > 0
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = SurgeryModule.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
    assert again._pairs == module._pairs == [tuple(pair) for pair in pairs]


def test_healing_brings_attention_back_too(tmp_path: Path) -> None:
    """With the term, blocks come closer to the original's than without it."""

    def left(weight: float) -> float:
        module = operated(
            tmp_path / "model",
            objective=options("objective", "distill", attention_weight=weight),
            optim=options("optim", "adamw", lr=1e-2),
        )
        trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=30)
        return float(trainer.callback_metrics["train/attention"])

    save_model(tmp_path / "model")
    assert left(1.0) < 0.8 * left(1e-9)


def _save_words(folder: Path, *words: str) -> Path:
    """A tokenizer of these words."""
    numbers = {word: number for number, word in enumerate(words)}
    model = WordLevel(numbers, unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
    return folder


def test_its_tokens_must_be_the_students(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(_save_words(tmp_path / "own", "a", "b", "c"))
    teacher = _teacher(tmp_path / "teacher")
    _save_words(teacher, "a", "b", "c", "more")  # nobody writes what only the teacher knows
    check_teacher_tokens(_spec(), str(teacher), own)
    for words, said in (
        (("a", "c", "b"), "token 1 is 'b' here, and 'c' there"),
        (("a", "b"), "token 2 is 'c' here, and nothing there"),
    ):
        _save_words(teacher, *words)
        with pytest.raises(ConfigError, match=said) as caught:
            check_teacher_tokens(_spec(), str(teacher), own)
        assert (caught.value.key, caught.value.given) == ("objective.teacher", str(teacher))
        assert caught.value.valid == "a model with the same tokenizer"


def test_the_tokenizer_compared_is_the_teachers_own(tmp_path: Path) -> None:
    """Not the one that `model.tokenizer` names for the student."""
    own = AutoTokenizer.from_pretrained(_save_words(tmp_path / "own", "a", "b"))
    teacher = _save_words(_teacher(tmp_path / "teacher"), "b", "a")
    with pytest.raises(ConfigError, match="was trained on other tokens"):
        check_teacher_tokens(_spec(tokenizer=str(tmp_path / "own")), str(teacher), own)


def test_a_teacher_without_a_tokenizer_is_trusted_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = AutoTokenizer.from_pretrained(_save_words(tmp_path / "own", "a", "b"))
    check_teacher_tokens(_spec(), str(_teacher(tmp_path / "teacher")), own)
    assert "objective.teacher brings no tokenizer" in capsys.readouterr().out
