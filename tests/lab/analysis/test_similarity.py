"""Divergences, inner products and redundancy, each against its formula done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from surgery.importance.capture import capture
from surgery.importance.score_file import read_scores
from surgery.lab.analysis import similarity as module
from surgery.lab.analysis.clusters import (
    build_tree,
    compute_redundancies,
    compute_redundancy,
    find_clusters,
    find_nearest,
    find_shared_groups,
    score_redundancy,
)
from surgery.lab.analysis.similarity import Similarity, compare_heads, sum_divergences
from surgery.lab.analysis.watch import find_self_attention
from surgery.models.sites import find_sites
from surgery.models.stack import find_stack
from surgery.operations.gqa.operation import GQA
from tests.lab.analysis import handmade
from tests.tiny_models import tiny_model, tokens


@pytest.mark.parametrize("block", [7, 200, 4_000_000])
def test_divergences_are_scipys_in_blocks_of_any_size(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(5, 6, 9, generator=generator) * 3, -1)
    p[0, :, 4:] = 0
    p[0, 0], p[0, 1] = torch.eye(9)[0], torch.eye(9)[3]  # nothing in common: one bit
    p = p / p.sum(-1, keepdim=True)
    got = sum_divergences(p)
    for a in range(6):
        for b in range(6):
            expected = sum(jensenshannon(p[r, a], p[r, b], base=2) ** 2 for r in range(5) if a != b)
            assert got[a, b] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_heads_of_a_model_are_compared_as_their_explicit_maps_and_outputs_say(name: str) -> None:
    """Padding is in neither; a row that sees one key has no choice, and is left out."""
    model = tiny_model(name, attention="eager").eval()
    ids = tokens(3, 10)
    real = torch.ones_like(ids)
    real[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": real}
    sites = find_self_attention(model)
    got = compare_heads(model, [batch], sites, None, 0)
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
        _, traces = capture(model, find_stack(model, sites), sites, batch)
    p = torch.cat(maps, 1).movedim(1, 2)
    seen = (p[:, :, 0] > 0).sum(-1) > 1
    rows = p[(real > 0) & seen]
    assert got.rows == len(rows)
    total = np.array(
        [
            [
                np.mean([jensenshannon(r[a], r[b], base=2) ** 2 for r in rows.numpy()])
                for a in range(8)
            ]
            for b in range(8)
        ]
    )
    assert torch.allclose(got.divergence, torch.tensor(np.nan_to_num(total)), atol=1e-5)
    added = []
    for site, trace in zip(sites, traces, strict=True):
        weight = model.get_parameter(f"{site.output.path}.weight").detach()
        weight = weight if site.output.transposed else weight.T
        inputs = trace.inputs[(real > 0) & seen]
        for head in range(4):
            own = slice(head * site.output.unit, (head + 1) * site.output.unit)
            added.append(inputs[:, own] @ weight[own])
    flat = torch.stack(added).flatten(1).double()
    assert torch.allclose(got.gram, flat @ flat.T / len(rows), rtol=1e-4, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], -1)
    assert torch.allclose(got.cosine, cosine, atol=1e-5)


def test_rows_can_be_fewer_and_are_then_the_same_for_all_heads() -> None:
    model = tiny_model("llama").eval()
    batches = [{"input_ids": tokens(2, 20, seed=n)} for n in range(3)]
    sites = find_self_attention(model)
    some = compare_heads(model, batches, sites, 4, 0)
    assert some.rows <= 3 * 2 * 4
    everything = compare_heads(model, batches, sites, None, 0)
    # An estimate of the same thing, and no head diverges from itself.
    assert (some.divergence - everything.divergence).abs().max() < 0.3
    assert some.divergence.diagonal().abs().max() == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 10_000), st.booleans())
def test_redundancy_is_the_share_that_least_squares_explains(
    heads: int, seed: int, repeated: bool
) -> None:
    outputs = np.random.default_rng(seed).normal(size=(heads, 30))
    if repeated:
        outputs[0] = -2 * outputs[1]
    got = compute_redundancy(torch.from_numpy(outputs @ outputs.T))
    for head in range(heads):
        others = np.delete(outputs, head, axis=0).T
        fitted = others @ np.linalg.lstsq(others, outputs[head], rcond=None)[0]
        share = (fitted**2).sum() / (outputs[head] ** 2).sum()
        assert got[head] == pytest.approx(share, abs=1e-6)
    if repeated:
        assert got[0] == pytest.approx(1)


@torch.no_grad()
def test_a_copied_head_is_redundant_nearest_to_its_copy_and_goes_first(tmp_path: Path) -> None:
    """Heads 1 and 2 of layer 1 get the weights of head 0, one of them turned round."""
    model = tiny_model("gpt2").eval()
    block = model.transformer.h[1].attn
    for role in range(3):
        for copy in (1, 2):
            source = slice(role * 32, role * 32 + 8)
            own = slice(role * 32 + copy * 8, role * 32 + copy * 8 + 8)
            block.c_attn.weight[:, own] = block.c_attn.weight[:, source]
            block.c_attn.bias[own] = block.c_attn.bias[source]
    block.c_proj.weight[8:16] = block.c_proj.weight[0:8]
    block.c_proj.weight[16:24] = -block.c_proj.weight[0:8]
    sites = find_self_attention(model)
    batches = [{"input_ids": tokens(4, 20)}]
    got = compare_heads(model, batches, sites, None, 0)
    assert compute_redundancies(got)[4:7].tolist() == pytest.approx([1, 1, 1])
    assert (compute_redundancies(got)[[0, 1, 2, 3, 7]] < 0.9).all()
    assert set(find_nearest(got.divergence)[4:7]) <= {4, 5, 6}
    families = find_clusters(build_tree(got.divergence), 1e-4)
    assert families[4] == families[5] == families[6]
    assert len(set(families)) == 6
    table = score_redundancy(got, sites, model="m", data="d", batches=1, seed=0)
    table.save(tmp_path / "redundancy.json")
    read = read_scores(str(tmp_path / "redundancy.json"), find_sites(model).sites, "key")
    assert read.heads is not None
    assert set(sorted(range(4), key=lambda head: read.heads[1][head])[:3]) == {0, 1, 2}
    assert json.loads((tmp_path / "redundancy.json").read_text())["estimator"] == "redundancy"


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_families_are_merged_while_their_mean_divergence_is_small(
    heads: int, seed: int, distance: float
) -> None:
    """Average linkage by its definition: merge the two nearest families, again and again."""
    points = np.random.default_rng(seed).uniform(size=(heads, heads))
    table = np.triu(points, 1) + np.triu(points, 1).T
    families = [[head] for head in range(heads)]

    def apart(one: list[int], two: list[int]) -> float:
        return float(np.mean([table[a, b] for a in one for b in two]))

    while len(families) > 1:
        pairs = [
            (apart(a, b), i, j)
            for i, a in enumerate(families)
            for j, b in enumerate(families)
            if i < j
        ]
        least, i, j = min(pairs)
        if least > distance:
            break
        families[i] += families.pop(j)
    got = find_clusters(build_tree(torch.from_numpy(table)), distance)
    assert got[0] == 0
    assert sorted({tuple(n for n in range(heads) if got[n] == k) for k in got}) == sorted(
        tuple(sorted(family)) for family in families
    )


def test_groups_are_of_the_heads_that_attend_alike_and_gqa_takes_them(tmp_path: Path) -> None:
    """By brute force over the three partitions of four heads; as the operation reads them."""
    model = tiny_model("gpt2").eval()
    sites = find_self_attention(model)
    got = compare_heads(model, [{"input_ids": tokens(4, 20)}], sites, None, 0)
    groups = find_shared_groups(got, sites)
    assert set(groups) == {"2"}
    for layer in range(2):
        table = got.divergence[4 * layer :, 4 * layer :]
        costs = {
            other: table[0, other] + table[tuple(n for n in (1, 2, 3) if n != other)]
            for other in (1, 2, 3)
        }
        best = min(costs, key=lambda other: float(costs[other]))
        expected = [[0, best], [n for n in (1, 2, 3) if n != best]]
        assert groups["2"][str(layer)] == expected
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    operation = GQA(kv_heads=2, groups=str(tmp_path / "groups.json"))
    assert operation.get_groups(sites[1], 2) == tuple(map(tuple, groups["2"]["1"]))


def test_kv_heads_are_as_far_apart_as_the_queries_that_read_them() -> None:
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4).eval()
    sites = find_self_attention(model)
    table = torch.ones(16, 16, dtype=torch.float64) - torch.eye(16, dtype=torch.float64)
    for a, b in ((0, 6), (1, 7), (0, 7), (1, 6)):  # queries of KV heads 0 and 3, in layer 0
        table[a, b] = table[b, a] = 0.5
    heads = tuple((layer, head) for layer in range(2) for head in range(8))
    groups = find_shared_groups(Similarity(heads, table, torch.eye(16), 1), sites)
    assert groups["2"]["0"] == [[0, 3], [1, 2]]


def test_built_heads_of_one_role_are_neighbours() -> None:
    model = handmade.gpt2()
    got = compare_heads(
        model, [{"input_ids": handmade.text(4)}], find_self_attention(model), None, 0
    )
    number = {head: n for n, head in enumerate(got.heads)}
    near = find_nearest(got.divergence)
    assert near[number[0, 3]] in (number[1, 1], number[1, 2])  # all near uniform in this text
    # The last token and the last but two have nothing in common, save where text begins.
    assert got.divergence[number[0, 0], number[0, 2]] > 0.95
