"""Gates against models that really lack the heads."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from surgery import SurgeryError, find_sites
from surgery.importance.gates import Gates, apply_gate
from surgery.importance.work import compute_logits
from tests.families import family, tokens
from tests.importance.cases import CASES, case, pruned


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_closed_gate_is_a_pruned_head(name: str) -> None:
    model, batch, _ = case(name)
    whole = compute_logits(model, batch)
    for site in find_sites(model).sites:
        heads = list(range(site.group_size, 2 * site.group_size))
        gate = torch.ones(site.q_heads)
        gate[heads] = 0
        with Gates(model, [site], {site.path: gate}):
            closed = compute_logits(model, batch)
        # T5's layers share one position bias, so a head of one alone cannot go.
        smaller = (zeroed if name == "t5" else pruned)(model, {site.layer: heads})
        torch.testing.assert_close(closed, compute_logits(smaller, batch), rtol=0, atol=1e-6)
        assert (closed - whole).abs().max() > 1e-4
    assert torch.equal(compute_logits(model, batch), whole)


def zeroed(model: PreTrainedModel, heads: dict[int, list[int]]) -> PreTrainedModel:
    """A copy whose output projections do not see these heads of each layer."""
    copied = copy.deepcopy(model)
    for site in find_sites(copied).sites:
        weight = copied.get_parameter(f"{site.output.path}.weight")
        for head in heads.get(site.layer, []):
            weight[:, head * site.output.unit : (head + 1) * site.output.unit] = 0
    return copied


@torch.no_grad()
def test_each_row_has_its_own_gates() -> None:
    model, batch, _ = case("gpt2")
    (site, *_) = find_sites(model).sites
    gates = torch.rand(3, site.q_heads)
    with Gates(model, [site]) as opened:
        opened.gates[site.path] = gates
        together = compute_logits(model, batch)
        for row in range(3):
            opened.gates[site.path] = gates[row]
            torch.testing.assert_close(compute_logits(model, batch)[row], together[row])


def test_flattened_rows_are_gated_alike() -> None:
    (site, *_) = find_sites(family("llama")).sites
    inputs, gates = torch.randn(3, 5, 64), torch.rand(3, 8)
    flat = apply_gate(inputs.flatten(0, 1), gates, site)
    assert torch.equal(flat.unflatten(0, (3, 5)), apply_gate(inputs, gates, site))
    for head in range(8):
        part = slice(head * 8, head * 8 + 8)
        torch.testing.assert_close(
            apply_gate(inputs, gates, site)[1, :, part], inputs[1, :, part] * gates[1, head]
        )


def test_a_projection_that_never_runs_is_noticed() -> None:
    model = family("llama")
    with Gates(model, find_sites(model).sites) as gates:
        model.model.layers[0](torch.randn(1, 4, 64).double(), position_embeddings=_rotary(model))
    with pytest.raises(SurgeryError, match=r"layers\.1\.self_attn"):
        gates.require_calls()


def _rotary(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return model.model.rotary_emb(torch.zeros(1, 4, 64).double(), torch.arange(4)[None])


def test_closed_gates_leave_no_hook_behind() -> None:
    model = family("llama")
    with Gates(model, find_sites(model).sites) as gates:
        gates.open()  # twice is once
        model(input_ids=tokens())
    assert set(gates.calls.values()) == {1}
    assert not any(module._forward_pre_hooks for module in model.modules())
