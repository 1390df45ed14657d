"""Gate gradients, output norms and random numbers against brute force."""

from __future__ import annotations

import pytest
import torch

from surgery import find_sites
from surgery.importance.estimate import average_batches, draw_random_scores
from surgery.importance.gate_gradient import GateGradient
from surgery.importance.gates import Gates
from surgery.importance.losses import compute_label_losses, find_labelled_positions, select_labelled
from surgery.importance.output_norm import OutputNorm
from surgery.importance.table import GROUPS, HEADS, UNITS
from surgery.importance.work import BatchScores, compute_logits
from tests.families import family
from tests.importance.cases import case, work


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "classes", "t5"])
def test_gate_gradients_are_those_of_each_example_alone(name: str) -> None:
    model, batch, task = case(name)
    sites = find_sites(model).sites
    found = GateGradient(work(model, sites, task, UNITS))(batch)
    heads = {site.path: torch.zeros(site.q_heads).double() for site in sites}
    groups = {site.path: torch.zeros(site.kv_heads).double() for site in sites}
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        where = find_labelled_positions(alone["labels"], task)
        gates = {
            site.path: torch.ones(site.q_heads, requires_grad=True, dtype=torch.float64)
            for site in sites
        }
        with Gates(model, sites, gates):
            loss = compute_label_losses(
                select_labelled(compute_logits(model, alone), where), where.labels
            ).mean()
        for site, slope in zip(sites, torch.autograd.grad(loss, list(gates.values())), strict=True):
            heads[site.path] += slope.abs() / 3
            groups[site.path] += slope.unflatten(0, (site.kv_heads, -1)).sum(1).abs() / 3
    for number, site in enumerate(sites):
        torch.testing.assert_close(
            found.scores[HEADS][number], heads[site.path], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            found.scores[GROUPS][number], groups[site.path], rtol=1e-4, atol=1e-6
        )
    assert found.weight == 3


@torch.no_grad()
def test_gate_gradients_are_slopes_of_the_loss() -> None:
    """Central differences, of one example."""
    model, batch, task = case("gpt2")
    alone = {name: value[:1] for name, value in batch.items()}
    where = find_labelled_positions(alone["labels"], task)
    sites = find_sites(model).sites
    found = GateGradient(work(model, sites, task, [HEADS]))(alone)
    for number, site in enumerate(sites):
        for head in range(site.q_heads):
            losses = []
            for step in (1e-4, -1e-4):
                gate = torch.ones(site.q_heads, dtype=torch.float64)
                gate[head] += step
                with Gates(model, [site], {site.path: gate}):
                    logits = select_labelled(compute_logits(model, alone), where)
                losses.append(compute_label_losses(logits, where.labels).mean().item())
            slope = abs(losses[0] - losses[1]) / 2e-4
            assert float(found.scores[HEADS][number][head]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_output_norms_are_those_of_what_a_head_adds(name: str) -> None:
    model, batch, task = case(name)
    sites = find_sites(model).sites
    found = OutputNorm(work(model, sites, task, UNITS))(batch)
    for number, site in enumerate(sites):
        module = model.get_submodule(site.output.path)
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        compute_logits(model, batch)
        handle.remove()
        bias = module(torch.zeros_like(seen[0]))
        real = torch.ones(3, 10)
        if name != "t5" or not (site.cached or site.cross):  # T5's decoder is not padded here
            real[1, 6:] = 0
        for unit, together in ((HEADS, 1), (GROUPS, site.group_size)):
            width = together * site.output.unit
            for index in range(site.q_heads // together):
                only = torch.zeros_like(seen[0])
                part = slice(index * width, index * width + width)
                only[..., part] = seen[0][..., part]
                norms = (module(only) - bias).norm(dim=-1)
                means = (norms * real).sum(1) / real.sum(1)
                expected = means.square().mean().sqrt().item()
                score = float(found.scores[unit][number][index])
                assert score == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_output_norms_do_not_follow_a_factor_between_values_and_output() -> None:
    model, batch, task = case("llama")
    site = find_sites(model).sites[0]
    scorer = work(model, [site], task, [HEADS])
    before = OutputNorm(scorer)(batch).scores[HEADS][0]
    model.get_parameter(f"{site.value.path}.weight").mul_(8)
    model.get_parameter(f"{site.output.path}.weight").div_(8)
    torch.testing.assert_close(OutputNorm(scorer)(batch).scores[HEADS][0], before)


def test_random_scores_follow_the_seed_and_the_site() -> None:
    model = family("qwen3", num_key_value_heads=4)
    sites = find_sites(model).sites

    def draw(seed: int, some: slice = slice(None)) -> torch.Tensor:
        given = work(model, sites[some], None, UNITS, seed=seed)  # type: ignore[arg-type]
        return torch.cat([draw_random_scores(given)[unit][-1] for unit in UNITS])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(draw(3, slice(1, None)), draw(3))  # a site's own, whoever is beside it
    many = torch.cat([draw(seed) for seed in range(200)])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.03)


def test_random_groups_of_one_head_are_heads() -> None:
    model = family("llama")
    scores = draw_random_scores(work(model, find_sites(model).sites, None, UNITS))  # type: ignore[arg-type]
    assert torch.equal(torch.stack(scores[HEADS]), torch.stack(scores[GROUPS]))


def test_errors_by_hand() -> None:
    def of(values: list[float], weight: int) -> BatchScores:
        return BatchScores({HEADS: [torch.tensor(values).double()]}, weight, weight)

    means, errors = average_batches([of([1.0, 5.0], 10), of([2.0, 5.0], 10), of([6.0, 5.0], 10)])
    assert means[HEADS][0].tolist() == [3.0, 5.0]
    # Deviations -2, -1, 3: variance 14 / 2 = 7, over 3 batches.
    assert errors[HEADS][0].tolist() == pytest.approx([(7 / 3) ** 0.5, 0.0])
    # Weights 3/4 and 1/4: mean 2; sqrt(2 / 1 ((3/4)^2 1 + (1/4)^2 9)).
    means, errors = average_batches([of([1.0], 30), of([5.0], 10)])
    assert means[HEADS][0].tolist() == [2.0]
    assert errors[HEADS][0].tolist() == pytest.approx([(2 * (9 / 16 + 9 / 16)) ** 0.5])
    means, errors = average_batches([of([1.0], 30)])
    assert means[HEADS][0].tolist() == [1.0]
    assert errors[HEADS][0].isnan().all()
