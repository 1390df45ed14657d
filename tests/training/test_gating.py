"""Heads closed by gates in training: a closed head is a cut one, and training goes on as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from surgery.config.schema import Task
from surgery.errors import ConfigError, SurgeryError
from surgery.execute.live import apply_
from surgery.importance import ScoreTable, SiteScores, score_heads
from surgery.models.sites import find_sites
from surgery.operations.prune_heads.gating import GatedPruning
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_specs, restore_saved_form_
from surgery.training.module import SurgeryModule
from tests.tiny_models import tiny_model, tokens
from tests.training.making import Losses, fit, operated, save_model, small_data

ROOT = Path(__file__).parents[2]
IMPORTANCE = {"objective": "lm", "windows": 4, "batch_size": 2, "memory_windows": 8}


def deferred(schedule: str = "gradual", **operation: Any) -> dict[str, Any]:
    """What is left to training: query heads, two of eight in all unless told otherwise."""
    spec = {"amount": 0.25, "estimator": "gate_gradient", "cut": "queries", "scope": "global"}
    if "count" in operation:
        del spec["amount"]
    return {
        "operation": {"operation": "prune_heads", **spec, "schedule": schedule, **operation},
        "importance": IMPORTANCE,
        "seed": 0,
        "native": False,
    }


def gating_of(sites: Any, task: Task, **operation: Any) -> GatedPruning:
    options = deferred(**operation)
    (spec,) = parse_specs([options["operation"]])
    decision = spec.follow_training(sites, options, task)
    assert isinstance(decision, GatedPruning)
    return decision


def decision_of(module: SurgeryModule) -> GatedPruning:
    assert isinstance(module.decision, GatedPruning)
    return module.decision


def cut_(model: Any, sites: Any, gating: GatedPruning, heads: dict[int, list[int]]) -> Any:
    """Remove closed heads from a trained model, as after training."""
    restore_saved_form_(model)
    decided = gating.operation.adopt_decision_on(sites, model, heads)
    return apply_(model, make_plan(model, [decided]))


# A closed head is a cut one.

CLOSED = {
    "groups": ("llama", {0: [0, 1]}, {}),
    "queries": ("llama", {0: [1, 2], 1: [0, 3]}, {}),
    "biases": ("qwen3", {0: [2, 3], 1: [0, 1]}, {}),
    "gpt2": ("gpt2", {0: [1], 1: [0, 2, 3]}, {}),
    "all of a layer": ("gpt2", {0: [0, 1, 2, 3], 1: [2]}, {"remove_attention": True}),
    "bert": ("bert", {0: [3], 1: [0, 2]}, {}),
}


@pytest.mark.parametrize("case", CLOSED)
def test_gates_of_zero_are_the_cut(case: str) -> None:
    name, heads, options = CLOSED[case]
    model = tiny_model(name).eval().double()
    task = Task.masked_lm if name == "bert" else Task.causal_lm
    sites = find_sites(model).sites
    gating = gating_of(sites, task, **options)
    untouched = _logits(model)
    gating.load_state_dict({"rounds": 1, "gate": 1.0, "events": _events(heads)})
    gating.attach(model)
    assert torch.equal(_logits(model), untouched)
    gating.load_state_dict({"rounds": 1, "gate": 0.0, "events": _events(heads)})
    gated = _logits(model)
    assert (gated - untouched).abs().max() > 0.1
    gating.detach()
    assert torch.equal(_logits(model), untouched)
    cut = cut_(model, sites, gating, gating.chosen)
    assert (_logits(cut) - gated).abs().max() <= 1e-10
    left = sum(site.q_heads for site in find_sites(cut).sites)
    assert left == sum(site.q_heads for site in sites) - sum(map(len, heads.values()))


@pytest.mark.parametrize("estimator", ["gate_gradient", "leave_one_out", "output_norm"])
def test_heads_are_scored_as_in_the_cut_model(estimator: str) -> None:
    """What is measured under gates of zero is what would be measured without these heads."""
    heads = {0: [1], 1: [0, 2]}
    model = tiny_model("gpt2").eval().double()
    sites = find_sites(model).sites
    gating = gating_of(sites, Task.causal_lm)
    gating.attach(model)
    gating.load_state_dict({"rounds": 1, "gate": 0.0, "events": _events(heads)})
    ids = tokens(4, 12)
    batches = [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]
    gated = score_heads(model, batches, estimator, units=("heads",)).heads
    gating.detach()
    cut_(model, sites, gating, heads)
    cut = score_heads(model, batches, estimator, units=("heads",)).heads
    assert gated is not None
    assert cut is not None
    for one, other in zip(gated, cut, strict=True):
        going = heads[one.layer]
        left = [score for head, score in enumerate(one.scores) if head not in going]
        assert left == pytest.approx(other.scores, rel=1e-5, abs=1e-10)
        assert [one.scores[head] for head in going] == pytest.approx([0] * len(going), abs=1e-10)


def test_layers_keep_their_numbers_where_one_is_gone(tmp_path: Path) -> None:
    """Layer 1 of the original is the only site left; it is still called 1."""
    folder = save_model(tmp_path / "model", name="gpt2")
    gone = {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}}
    module = operated(folder, attention=gone, deferred=deferred(cut="groups", amount=0.5))
    fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    assert module.model is not None
    gating = decision_of(module)
    assert list(gating.chosen) == [1]
    gated = _logits(module.model.eval().double())
    gating.detach()
    cut_(module.model, module.plan.after, gating, gating.chosen)
    assert (_logits(module.model) - gated).abs().max() <= 1e-10


def test_layers_are_chosen_by_number_where_one_is_gone(tmp_path: Path) -> None:
    """Of the sites left, 1 and 2, layer 1 is the first."""
    folder = save_model(tmp_path / "model", name="gpt2", n_layer=3)
    gone = {"prune_heads": {"heads": {0: [0, 1, 2, 3]}, "remove_attention": True}}
    options = deferred(cut="groups", amount=0.5, layers=[1])
    module = operated(folder, attention=gone, deferred=options)
    fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    assert {layer: len(heads) for layer, heads in decision_of(module).chosen.items()} == {1: 2}


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits = model(input_ids=tokens(2, 12)).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _events(heads: dict[int, list[int]]) -> list[dict[str, Any]]:
    return [{"step": 0, "closed": {str(layer): found for layer, found in heads.items()}}]


# In training.


class Open(Callback):
    """(step, share of heads open) of every training batch, as its forward pass saw it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append((trainer.global_step, decision_of(pl_module).open_share))


def _scored(model: Any, sites: Any, estimator: str, unit: str) -> ScoreTable:
    """Every head as good as its number."""
    rows = tuple(
        SiteScores(site.layer, site.path, tuple(map(float, range(site.q_heads))), (0.0,) * 4)
        for site in sites
    )
    return ScoreTable(estimator, "lm", rows, None)


def test_gates_follow_optimizer_steps(tmp_path: Path) -> None:
    """With accumulation each step is two batches, and both see the same gates."""
    module = operated(
        save_model(tmp_path / "model"),
        attention={},
        scorer=_scored,
        deferred=deferred(until=0.75, scope="layer", count=2),
    )
    watch = Open()
    fit(
        module,
        small_data(tmp_path),
        tmp_path,
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[watch],
    )
    shares = [1 - (1 - (1 - step / 3) ** 3) * 4 / 8 for step in range(3)] + [0.5]
    assert watch.seen == [
        (step, pytest.approx(share)) for step, share in enumerate(shares) for _ in range(2)
    ]
    gating = decision_of(module)
    assert gating.chosen == {0: [0, 2], 1: [0, 2]}  # of each group its first
    assert gating.to_json()["events"] == [{"step": 3, "closed": {"0": [0, 2], "1": [0, 2]}}]


def test_rounds_measure_the_model_with_what_is_closed(tmp_path: Path) -> None:
    """What is measured at a round is the model that the rounds before left, at rest."""
    seen = []

    def scorer(model: Any, *args: Any) -> ScoreTable:
        assert not any(module.training for module in model.modules())
        gated, closed = _logits(model), decision_of(module).chosen
        decision_of(module).detach()
        open_again = _logits(model)
        decision_of(module).attach(model)
        seen.append((module.global_step, closed, torch.equal(gated, open_again)))
        return _scored(model, *args)

    module = operated(
        save_model(tmp_path / "model"),
        attention={},
        scorer=scorer,
        deferred=deferred("iterative", rounds=2, until=1.0, scope="layer", count=2),
    )
    watch = Open()
    fit(module, small_data(tmp_path), tmp_path, max_steps=4, callbacks=[watch])
    assert seen == [(0, {}, True), (2, {0: [0, 2]}, False)]
    assert watch.seen == [(0, 0.75), (1, 0.75), (2, 0.5), (3, 0.5)]
    assert module.model is not None
    assert module.model.training


@pytest.mark.parametrize("estimator", ["gate_gradient", "leave_one_out"])
def test_measuring_leaves_no_trace_in_training(tmp_path: Path, estimator: str) -> None:
    """Rounds that close nothing, amid accumulation and dropout: the same losses and weights."""
    folder = save_model(tmp_path / "model", attention_dropout=0.2)
    found = []
    for options in (None, deferred("iterative", estimator=estimator, amount=0.0, until=1.0)):
        module = operated(folder, attention={}, deferred=options)
        losses = Losses()
        torch.manual_seed(0)
        fit(
            module,
            small_data(tmp_path),
            tmp_path,
            max_steps=4,
            accumulate_grad_batches=2,
            callbacks=[losses],
        )
        assert module.model is not None
        found.append((losses.values, module.model.state_dict()))
    assert decision_of(module).rounds == 4
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


RESUMED = [
    deferred("gradual", until=0.7),
    deferred("iterative", rounds=3, until=1.0, amount=0.5),
    deferred("iterative", rounds=2, until=1.0, estimator="random", cut="groups", amount=0.25),
]


@pytest.mark.parametrize("options", RESUMED)
def test_resume_goes_on_as_if_never_stopped(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "model")

    def run(stop: int | None = None, resume: Path | None = None) -> tuple[SurgeryModule, list]:
        module, losses = operated(folder, attention={}, deferred=options), Losses(stop)
        callbacks: list[Callback] = [losses]
        if stop is not None:  # saved by a callback, before the gates move on to this step
            callbacks.append(_Save(tmp_path / "three.ckpt", stop))
        trainer = fit(
            module, small_data(tmp_path), tmp_path, max_steps=6, resume=resume, callbacks=callbacks
        )
        if stop is not None:  # and after
            trainer.save_checkpoint(tmp_path / "after.ckpt")
        return module, losses.values

    straight, losses = run()
    stopped, first = run(stop=3)
    assert decision_of(straight).chosen
    for file in ("three.ckpt", "after.ckpt"):
        resumed, second = run(resume=tmp_path / file)
        assert first + second == losses
        assert decision_of(resumed).state_dict() == decision_of(straight).state_dict()
        for (name, a), (_, b) in zip(
            straight.named_parameters(), resumed.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
    again = SurgeryModule.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert decision_of(again).state_dict() == decision_of(stopped).state_dict()
    assert torch.equal(_logits(again.model.eval()), _logits(stopped.model.eval()))


class _Save(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# What is refused.


def test_another_schedule_cannot_be_resumed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    module = operated(folder, attention={}, deferred=deferred())
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for options in (None, deferred(until=0.6)):
        other = operated(folder, attention={}, deferred=options)
        with pytest.raises(ConfigError, match="checkpoint to resume from") as caught:
            fit(other, small_data(tmp_path), tmp_path, max_steps=2, resume=tmp_path / "one.ckpt")
        assert caught.value.key == "attention.prune_heads"


def test_a_resumed_decision_keeps_what_it_depends_on(tmp_path: Path) -> None:
    """The error names the key that differs; what changes no decision may differ."""
    folder, data, first = save_model(tmp_path / "model"), small_data(tmp_path), deferred()
    module = operated(folder, attention={}, deferred=first)
    trainer = fit(module, data, tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")

    def resume(**changed: Any) -> SurgeryModule:
        other = operated(folder, attention={}, deferred={**first, **changed})
        fit(other, data, tmp_path, max_steps=2, resume=tmp_path / "one.ckpt")
        return other

    for key, changed in {
        "importance.windows": {"importance": {**IMPORTANCE, "windows": 2}},
        "importance.objective": {"importance": {**IMPORTANCE, "objective": "distill"}},
        "seed": {"seed": 1},
    }.items():
        with pytest.raises(ConfigError, match="checkpoint to resume from") as caught:
            resume(**changed)
        assert caught.value.key == key
    again = resume(importance={**IMPORTANCE, "memory_windows": 2}, native=True)
    assert again.global_step == 2
    assert decision_of(again).chosen == decision_of(module).chosen


def test_no_cut_before_all_is_closed(tmp_path: Path) -> None:
    for schedule in ("gradual", "iterative"):
        module = operated(
            save_model(tmp_path / "model"),
            attention={},
            scorer=_scored,
            deferred=deferred(schedule, until=1.0),
        )
        trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=4, callbacks=[Losses(2)])
        with pytest.raises(SurgeryError, match="training ended at step 2, before all heads"):
            decision_of(module).finish(trainer)


def test_a_training_that_cannot_close_heads(tmp_path: Path) -> None:
    folder, data = save_model(tmp_path / "model"), small_data(tmp_path)
    few = operated(folder, attention={}, deferred=deferred("iterative", rounds=3))
    with pytest.raises(ConfigError, match="more rounds than steps") as caught:
        fit(few, data, tmp_path, max_steps=4)
    assert caught.value.key == "attention.prune_heads.rounds"
    alone = operated(folder, attention={}, deferred=deferred())
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ConfigError, match="no TextData") as caught:
        trainer.fit(alone, train_dataloaders=data.train_dataloader())
    assert caught.value.key == "attention.prune_heads.schedule"


def test_heads_that_cannot_be_cut_stop_the_first_step(tmp_path: Path) -> None:
    """Only measuring tells that the layers will differ, which a native export cannot say."""

    def unlike(model: Any, sites: Any, *args: Any) -> ScoreTable:
        rows = tuple(SiteScores(s.layer, s.path, (float(s.layer),) * 4, (0.0,) * 4) for s in sites)
        return ScoreTable("random", "lm", rows, None)

    module = operated(
        save_model(tmp_path / "model"),
        attention={},
        scorer=unlike,
        deferred={**deferred(), "native": True},
    )
    with pytest.raises(ConfigError, match="cannot be native") as caught:
        fit(module, small_data(tmp_path), tmp_path, max_steps=4)
    assert caught.value.key == "export.format"
    assert module.global_step == 0
