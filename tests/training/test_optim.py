"""The optimizers: Muon and AdamW side by side are Muon and AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from surgery.config.schema import OptimConfig
from surgery.training.module import parse_section
from surgery.training.optim import MuonWithAdamW, build_optimizer, make_warmup_cosine
from tests.tiny_models import tiny_model, tokens
from tests.training.making import options


def _optim(name: str, **fields: Any) -> OptimConfig:
    cfg = parse_section(OptimConfig, options("optim", name, **fields))
    assert isinstance(cfg, OptimConfig)
    return cfg


MUON = _optim("muon", lr=0.02, weight_decay=0.1, warmup_steps=2)


def _step(model: nn.Module, optimizers: list[Any], seed: int) -> None:
    ids = tokens(2, 12, seed)
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _apart(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's own Muon and AdamW over the same parameters."""
    hidden = [p for n, p in model.named_parameters() if "proj" in n]
    others = [p for n, p in model.named_parameters() if "proj" not in n]
    assert {p.ndim for p in hidden} == {2}
    return [
        torch.optim.Muon(
            hidden, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def test_together_they_do_what_each_does_alone() -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    together, apart = build_optimizer(one.named_parameters(), MUON), _apart(two)
    assert isinstance(together, MuonWithAdamW)
    for step in range(4):
        _step(one, [together], step)
        _step(two, apart, step)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_schedule_reaches_both() -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    together, apart = build_optimizer(one.named_parameters(), MUON), _apart(two)
    schedules = [make_warmup_cosine(each, MUON, total_steps=6) for each in (together, *apart)]
    rates = []
    for step in range(6):
        rates.append([group["lr"] for group in together.param_groups])
        assert rates[-1] == [each.param_groups[0]["lr"] for each in apart]
        _step(one, [together], step)
        _step(two, apart, step)
        for schedule in schedules:
            schedule.step()
    assert len({rate for rate, _ in rates}) == 5  # the last of the warm-up is the peak
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_a_round_trip(name: str) -> None:
    cfg = _optim(name, lr=0.02)
    one = tiny_model("llama")
    optimizer = build_optimizer(one.named_parameters(), cfg)
    schedule = make_warmup_cosine(optimizer, cfg, total_steps=9)
    for step in range(3):
        _step(one, [optimizer], step)
        schedule.step()
    two = copy.deepcopy(one)
    again = build_optimizer(two.named_parameters(), cfg)
    resumed = make_warmup_cosine(again, cfg, total_steps=9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(schedule.state_dict())
    for step in range(3, 6):
        _step(one, [optimizer], step)
        _step(two, [again], step)
        schedule.step()
        resumed.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in again.param_groups]
    for (key, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), key


def test_the_state_can_be_seen_from_outside() -> None:
    model = tiny_model("llama")
    optimizer = build_optimizer(model.named_parameters(), MUON)
    assert not optimizer.state
    _step(model, [optimizer], 0)
    assert set(optimizer.state) == set(model.parameters())
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(optimizer.state)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name: str) -> None:
    """Without gradients to speak of, decay alone moves a weight."""
    model = tiny_model("llama")
    optimizer = build_optimizer(
        model.named_parameters(), _optim(name, lr=0.01, weight_decay=0.5, warmup_steps=0)
    )
    tables = {"model.embed_tokens.weight", "lm_head.weight"} if name == "muon" else set()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        decays = parameter.ndim == 2 and key not in tables
        factor = 1 - 0.01 * 0.5 if decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor, msg=key)


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model.named_parameters(), _optim(name))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_closure_is_run_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([("weight", weight)], MUON)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert (weight < 1).all()


def _factors(cfg: OptimConfig, total: int | None, steps: int) -> list[float]:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = make_warmup_cosine(optimizer, cfg, total)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_at_its_corners() -> None:
    cfg = _optim("adamw", warmup_steps=10, final_lr_fraction=0.1)
    rates = _factors(cfg, 110, 130)
    assert rates[0] == pytest.approx(1 / 10)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # halfway down the cosine
    assert rates[110] == pytest.approx(0.1)
    assert rates[129] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_schedule_without_an_end_or_without_a_warmup() -> None:
    assert _factors(_optim("adamw", warmup_steps=4), None, 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert _factors(_optim("adamw", warmup_steps=0), None, 2) == [1, 1]
    assert _factors(_optim("adamw", warmup_steps=0, final_lr_fraction=0.0), 2, 3) == [
        1.0,
        pytest.approx(0.5),
        pytest.approx(0.0),
    ]
    # Training that ends inside the warm-up.
    assert _factors(_optim("adamw", warmup_steps=4), 2, 2) == [0.25, 0.5]
