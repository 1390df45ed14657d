"""Leave-one-out: work shared, a whole pass per head, and models that really lack the head."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from surgery import find_sites
from surgery.config.schema import ObjectiveName, Task
from surgery.data.collate import Batch
from surgery.importance import leave_one_out
from surgery.importance.leave_one_out import LeaveOneOut
from surgery.importance.table import GROUPS, HEADS, UNITS
from surgery.importance.work import list_ablations
from surgery.measure.loss import compute_mean_loss
from tests.families import family, masked_lm, tokens
from tests.importance.cases import CASES, case, pruned, work

OBJECTIVES = list(ObjectiveName)
# An encoder and a decoder; layers that are one layer.
ALONE = ("t5",)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(leave_one_out, "say", lines.append)
    return lines


def both(name: str, objective: ObjectiveName) -> tuple[LeaveOneOut, LeaveOneOut, Batch]:
    model, batch, task = case(name)
    given = work(model, find_sites(model).sites, task, UNITS, objective=objective)
    return LeaveOneOut(given), LeaveOneOut(given, share=False), batch


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", CASES)
def test_sharing_work_changes_nothing(name: str, objective: ObjectiveName, said: list[str]) -> None:
    shared, alone, batch = both(name, objective)
    found, expected = shared(batch), alone(batch)
    assert found.loss == pytest.approx(expected.loss, abs=1e-9)
    for unit in UNITS:
        for mine, other in zip(found.scores[unit], expected.scores[unit], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)
            assert mine.abs().min() > 0
    assert bool(said) == (name in ALONE)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "classes"])
def test_scores_are_the_loss_of_the_pruned_model(name: str) -> None:
    model, batch, task = case(name)
    sites = find_sites(model).sites
    found = LeaveOneOut(work(model, sites, task, UNITS))(batch)
    whole = compute_mean_loss(model, [dict(batch)], task, total=1, label="whole")
    for number, site in enumerate(sites):
        group = [*range(site.group_size)]
        without = compute_mean_loss(
            pruned(model, {site.layer: group}), [dict(batch)], task, total=1, label="pruned"
        )
        score = float(found.scores[GROUPS][number][0])
        assert score == pytest.approx(without - whole, abs=1e-6)


@pytest.mark.parametrize("name", ["cohere", "phi", "gpt_oss", "glm4", "falcon_h1", "olmo2"])
def test_blocks_of_other_shapes_share_work_too(name: str, said: list[str]) -> None:
    """Parallel MLPs, sandwich norms, sinks, a state space beside the attention."""
    model = family(name)
    batch = {"input_ids": tokens(2, 8), "labels": tokens(2, 8)}
    given = work(model, find_sites(model).sites, Task.causal_lm, [HEADS])
    found, expected = LeaveOneOut(given)(batch), LeaveOneOut(given, share=False)(batch)
    for mine, other in zip(found.scores[HEADS], expected.scores[HEADS], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert not said


@pytest.mark.parametrize("positions", [1, 25, 40, 1000])
@pytest.mark.parametrize("memory_rows", [1, 2, 5, 32])
def test_how_many_run_side_by_side_changes_nothing(
    positions: int, memory_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leave_one_out, "CPU_POSITIONS", positions)
    model, batch, task = case("qwen3")
    given = work(model, find_sites(model).sites, task, [HEADS], memory_rows=memory_rows)
    rows: list[int] = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    found = LeaveOneOut(given)(batch)
    handle.remove()
    assert max(rows) <= memory_rows
    expected = _reference()
    for mine, other in zip(found.scores[HEADS], expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)


def _reference(cache: list[list[torch.Tensor]] = []) -> list[torch.Tensor]:  # noqa: B006
    if not cache:
        model, batch, task = case("qwen3")
        given = work(model, find_sites(model).sites, task, [HEADS])
        cache.append(LeaveOneOut(given, share=False)(batch).scores[HEADS])
    return cache[0]


def test_layers_below_never_run_again() -> None:
    model, batch, task = case("llama")
    ran = [0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda *_, number=number: ran.__setitem__(number, ran[number] + 1)
        )
    LeaveOneOut(work(model, find_sites(model).sites, task, [HEADS], memory_rows=3))(batch)
    # Each of three rows runs once, and one of them once more per site, to be compared with. Eight
    # ablations, three side by side, are three passes per row: none in the lower layer projects
    # queries anew, and those of the lower layer do so in the upper.
    assert ran == [3 + 2, 3 + 2 + 3 * 3]


def test_layers_that_are_one_layer_get_whole_passes(said: list[str]) -> None:
    model = masked_lm("albert", num_hidden_groups=1)
    batch = {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}
    given = work(model, find_sites(model).sites, Task.masked_lm, [HEADS])
    found, expected = LeaveOneOut(given)(batch), LeaveOneOut(given, share=False)(batch)
    assert torch.equal(found.scores[HEADS][0], expected.scores[HEADS][0])
    assert len(said) == 1
    assert "a full pass for every head" in said[0]


def test_a_model_that_cannot_be_resumed_is_noticed(said: list[str]) -> None:
    """Here a layer's work leaks past its output, into the last layer."""
    model, batch, task = case("llama")
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, output: seen.append(output))
    model.model.layers[1].register_forward_pre_hook(
        lambda m, args: (args[0] + seen[-1].mean(dim=(0, 1)), *args[1:])
    )
    given = work(model, find_sites(model).sites, task, [HEADS])
    found, expected = LeaveOneOut(given)(batch), LeaveOneOut(given, share=False)(batch)
    for mine, other in zip(found.scores[HEADS], expected.scores[HEADS], strict=True):
        torch.testing.assert_close(mine, other)
    assert "off by" in said[0]


def test_rows_without_labels_change_nothing() -> None:
    model, batch, task = case("llama")
    sites = find_sites(model).sites
    more = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    more["labels"][3] = -100
    scorer = LeaveOneOut(work(model, sites, task, [HEADS]))
    assert scorer(more).weight == scorer(batch).weight
    torch.testing.assert_close(
        torch.stack(scorer(more).scores[HEADS]), torch.stack(scorer(batch).scores[HEADS])
    )


def test_nothing_is_taken_away_twice() -> None:
    (site, other) = find_sites(family("llama")).sites
    assert len(list_ablations([site], UNITS)) == 8  # a group is a head
    grouped = dataclasses.replace(other, kv_heads=2)
    cuts = list_ablations([site, grouped], UNITS)
    assert len(cuts) == 8 + 8 + 2
    assert cuts[-1].heads == (4, 5, 6, 7)
    assert cuts[-1].units == ((GROUPS, 1),)
