"""`optim.parameters`: what is chosen moves, and everything else keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from surgery.config.schema import Trained
from surgery.errors import ConfigError
from surgery.operations.fuse_qkv.projections import unfuse_qkv_
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from surgery.training.module import SurgeryModule
from surgery.training.parameters import check_parameters, list_changed_names
from tests.tiny_models import tiny_model
from tests.training.making import fit, operated, options, save_model, small_data

GQA: dict[str, Any] = {"gqa": {"kv_heads": 1}}
PRUNE: dict[str, Any] = {"prune_heads": {"heads": [2, 3]}}
ONE_LAYER: dict[str, Any] = {"gqa": {"kv_heads": 1, "layers": [1]}}
TO_ROPE: dict[str, Any] = {"absolute_to_rope": {"theta": 1e4}}
REMOVE = {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}
GONE: dict[str, Any] = {**ONE_LAYER, "prune_heads": REMOVE}
Q, K, V, O = (f"{role}_proj.weight" for role in "qkvo")  # noqa: E741

# Model, operations, choice, and the ends of the names that must be trained, in layers.
CASES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], tuple[int, ...]]] = {
    "attention": ("llama", GQA, "attention", (Q, K, V, O), (0, 1)),
    "attention with norms": (
        "qwen3",
        GQA,
        "attention",
        (Q, K, V, O, "q_norm.weight", "k_norm.weight"),
        (0, 1),
    ),
    "attention, fused": ("llama", {"fuse_qkv": {}}, "attention", (Q, K, V, O), (0, 1)),
    "attention, nothing done": ("llama", {}, "attention", (Q, K, V, O), (0, 1)),
    "attention, some removed": ("llama", GONE, "attention", (Q, K, V, O), (1,)),
    "changed": ("llama", GQA, "changed", (K, V), (0, 1)),
    "changed in one layer": ("llama", ONE_LAYER, "changed", (K, V), (1,)),
    "changed twice": ("llama", {**PRUNE, **GQA}, "changed", (Q, K, V, O), (0, 1)),
    "changed, then fused": ("llama", {**PRUNE, "fuse_qkv": {}}, "changed", (Q, K, V, O), (0, 1)),
    "changed, others removed": ("llama", GONE, "changed", (K, V), (1,)),
    "changed in a new architecture": (
        "gpt2",
        {**TO_ROPE, **GQA},
        "changed",
        (K, V, "k_proj.bias", "v_proj.bias"),
        (0, 1),
    ),
}


class NoOtherGradient(Callback):
    """At every step: the optimizer holds what is trained, and nothing else has a gradient."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.steps += 1
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.model.parameters() if p.requires_grad}
        assert held == {id(p) for p in module.model.parameters() if p.grad is not None}


def _module(folder: Path, attention: dict[str, Any], choice: str, optim: str) -> SurgeryModule:
    return operated(
        folder,
        attention=attention,
        attn_implementation="sdpa",
        optim=options("optim", optim, parameters=choice, lr=1e-2, warmup_steps=1),
    )


def _tensors(module: SurgeryModule) -> dict[str, torch.Tensor]:
    """As they would be exported."""
    assert module.model is not None
    unfuse_qkv_(module.model)
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("case", CASES)
def test_only_the_chosen_move(tmp_path: Path, case: str, optim: str) -> None:
    name, attention, choice, ends, layers = CASES[case]
    folder = save_model(tmp_path / "model", name=name)
    module = _module(folder, attention, choice, optim)
    watching = NoOtherGradient()
    fit(module, small_data(tmp_path), tmp_path, max_steps=3, callbacks=[watching])
    assert watching.steps == 3
    module.undo_freezing()
    assert module.model is not None
    assert all(p.requires_grad for p in module.model.parameters())
    reference = _module(folder, attention, "all", optim)
    reference.configure_model()
    before, after = _tensors(reference), _tensors(module)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        name
        for name in before
        if name.endswith(ends) and any(f"layers.{n}." in name for n in layers)
    }
    assert moved == expected
    assert module.trained == sum(before[name].numel() for name in expected)


def test_all_means_all(tmp_path: Path) -> None:
    module = operated(save_model(tmp_path / "model"))
    module.configure_model()
    assert module.model is not None
    assert module.trained == sum(p.numel() for p in module.model.parameters())


def test_tied_tensors_rest_together(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    module = _module(folder, GQA, "attention", "muon")
    fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    assert module.model is not None
    head, table = module.model.lm_head.weight, module.model.get_input_embeddings().weight
    assert head is table
    assert not table.requires_grad
    assert torch.equal(table, operated(folder).source.load().get_input_embeddings().weight)


def test_configuring_twice_and_fitting_again(tmp_path: Path) -> None:
    module = _module(save_model(tmp_path / "model"), GQA, "changed", "adamw")

    def frozen() -> set[str]:
        assert module.model is not None
        return {name for name, p in module.model.named_parameters() if not p.requires_grad}

    module.configure_model()
    first = frozen()
    module.configure_model()
    assert frozen() == first
    module.undo_freezing()
    assert not frozen()
    fit(module, small_data(tmp_path), tmp_path, max_steps=1)
    assert frozen() == first


def test_what_was_frozen_before_stays_frozen(tmp_path: Path) -> None:
    module = _module(save_model(tmp_path / "model"), GQA, "attention", "adamw")
    made = _module(tmp_path / "model", GQA, "all", "adamw")
    made.configure_model()
    assert made.model is not None
    table = made.model.get_input_embeddings().weight.requires_grad_(False)
    module.adopt(made.model)
    module.configure_model()
    module.undo_freezing()
    assert not table.requires_grad
    assert all(p.requires_grad for p in made.model.parameters() if p is not table)


@pytest.mark.parametrize("choice", ["attention", "changed"])
def test_a_checkpoint_brings_all_weights_back(tmp_path: Path, choice: str) -> None:
    module = _module(save_model(tmp_path / "model"), GQA, choice, "muon")
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = SurgeryModule.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
    assert again.model is not None
    assert module.model is not None
    for (name, a), (_, b) in zip(
        module.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name


def test_resuming_with_other_parameters_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    trainer = fit(_module(folder, GQA, "all", "adamw"), small_data(tmp_path), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError) as caught:
        fit(
            _module(folder, GQA, "attention", "adamw"),
            small_data(tmp_path),
            tmp_path,
            max_steps=2,
            resume=tmp_path / "one.ckpt",
        )
    assert (caught.value.key, caught.value.valid) == ("optim.parameters", "all")


def test_names_are_those_of_the_result() -> None:
    plan = make_plan(tiny_model("gpt2"), parse_operations({**TO_ROPE, **GQA}))
    assert {name.split(".")[0] for name in list_changed_names(plan)} == {"model"}


def test_what_was_removed_after_it_was_changed_is_not_named() -> None:
    plan = make_plan(tiny_model("llama"), parse_operations({**GQA, "prune_heads": REMOVE}))
    assert list_changed_names(plan) == [f"model.layers.1.self_attn.{kv}" for kv in (K, V)]


@pytest.mark.parametrize(
    ("attention", "choice"),
    [
        ({}, Trained.changed),
        ({"rehouse": {"into": "phi3"}}, Trained.changed),
        ({"backend": {"implementation": "eager"}}, Trained.changed),
        ({**GQA, "fuse_qkv": {}}, Trained.changed),
        (
            {**GQA, "prune_heads": {"heads": [0, 1, 2, 3], "remove_attention": True}},
            Trained.changed,
        ),
        ({"prune_heads": {"heads": [0, 1, 2, 3], "remove_attention": True}}, Trained.attention),
    ],
)
def test_a_choice_that_cannot_be(attention: dict[str, Any], choice: Trained) -> None:
    plan = make_plan(tiny_model("llama"), parse_operations(attention))
    with pytest.raises(ConfigError) as caught:
        check_parameters(plan, choice)
    assert caught.value.key == "optim.parameters"
    check_parameters(plan, Trained.all)
