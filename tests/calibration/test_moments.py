"""Running sums against a dense computation, and what must not make a difference to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.calibration.view import observe_site
from surgery.errors import SiteError
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site, find_sites
from surgery.operations.gqa.moments import SiteMoments
from surgery.operations.gqa.planes import Planes, make_half_split, make_interleaved
from tests.calibration.models import KINDS, made
from tests.families import family, tokens

ALL_ROWS = 10_000
GROUPS = ((0, 3, 1, 6), (2, 4, 5, 7))


def summed(
    model: PreTrainedModel,
    data: list[Any],
    *,
    layer: int = 1,
    rows: int = ALL_ROWS,
    groups: Any = GROUPS,
) -> SiteMoments:
    work = make_sharing_copy(model)
    site = find_sites(work).sites[layer]
    moments = SiteMoments(work, site, groups, rows, 0)
    for batch in data:
        moments.add(observe_site(work, site, batch))
    return moments


@torch.no_grad()
def dense(model: PreTrainedModel, site: Site, data: list[Any]) -> dict[str, Tensor]:
    """Keys, queries, values and attended values of every real token, from hidden states by hand.

    For a Llama: [T, heads, D] each; attended values [T, query heads, KV heads, D].
    """
    found: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "z": []}
    attention = model.get_submodule(site.path)
    norm = model.get_submodule(site.path.rpartition(".")[0]).input_layernorm
    for batch in data:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        hidden = model(**batch, use_cache=False, output_hidden_states=True).hidden_states[
            site.layer
        ]
        q, k, v = (
            projection(norm(hidden)).unflatten(-1, (-1, site.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        length = ids.shape[1]
        speeds = 1e4 ** -(torch.arange(0, site.head_dim, 2).double() / site.head_dim)
        # transformers counts positions from the start of the row, padding included.
        turn = torch.polar(torch.ones(1).double(), torch.arange(length).double()[:, None] * speeds)[
            :, None
        ]
        half = site.head_dim // 2
        turned = [torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k)]
        size = site.group_size
        logits = (
            torch.einsum(
                "bnhp,bshp->bhns", turned[0], turned[1].repeat_interleave(size, 2).conj()
            ).real
            / site.head_dim**0.5
        )
        seen = torch.ones(length, length).tril().bool() & mask[:, None, None, :]
        shares = torch.softmax(logits.masked_fill(~seen, float("-inf")), dim=-1).nan_to_num(0)
        z = torch.einsum("bhns,bsgd->bnhgd", shares, v)
        for name, value in (("q", q), ("k", k), ("v", v), ("z", z)):
            found[name].append(value[mask])
    return {name: torch.cat(values) for name, values in found.items()}


def assert_are(moments: SiteMoments, by_hand: dict[str, Tensor], site: Site) -> None:
    keys, count = moments.get_key_moments(), len(by_hand["k"])
    half = site.head_dim // 2
    k = torch.complex(by_hand["k"][..., :half], by_hand["k"][..., half:])
    close(keys.planes, torch.einsum("thp,tgp->phg", k, k.conj()) / count)
    power = by_hand["q"].unflatten(-1, (2, half)).pow(2).sum(-2).mean(0)  # [Hq, P]
    close(keys.power, power.unflatten(0, (site.kv_heads, -1)).sum(1).mT)
    v = by_hand["v"].flatten(1)
    close(moments.get_value_moments(), v.mT @ v / count)
    attended = moments.get_attended_moments()
    assert set(attended) == set(range(site.q_heads))
    for group in GROUPS:
        for member in group:
            for head in range(member * site.group_size, (member + 1) * site.group_size):
                z = by_hand["z"][:, head][:, list(group)].flatten(1)
                close(attended[head], z.mT @ z / count)


def close(actual: Tensor, expected: Tensor) -> None:
    atol = 2e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 16, "head_dim": 8}])
def test_they_are_what_a_dense_computation_gives(fields: dict[str, Any]) -> None:
    model = family("llama_biased", **fields)
    data = [{"input_ids": tokens(3, 10, n)} for n in range(2)]
    site = find_sites(model).sites[1]
    assert_are(summed(model, data), dense(model, site, data), site)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side: str) -> None:
    model = family("llama_biased")
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
    if side == "right":
        mask[0, 4:], mask[2, 8:] = 0, 0
    else:
        mask[0, :4], mask[2, :8] = 0, 0
    padded = {"input_ids": ids, "attention_mask": mask}
    site = find_sites(model).sites[1]
    first = summed(model, [padded])
    assert_are(first, dense(model, site, [padded]), site)
    # Whatever stands there.
    other = {"input_ids": torch.where(mask.bool(), ids, 3), "attention_mask": mask}
    assert_alike(first, summed(model, [other]))


def assert_alike(one: SiteMoments, two: SiteMoments) -> None:
    close(one.get_key_moments().planes, two.get_key_moments().planes)
    close(one.get_key_moments().power, two.get_key_moments().power)
    close(one.get_value_moments(), two.get_value_moments())
    for head, total in one.get_attended_moments().items():
        close(total, two.get_attended_moments()[head])


def test_how_the_data_is_cut_into_batches_does_not_matter() -> None:
    model, ids = family("qwen2"), tokens(8, 12)
    ones = [{"input_ids": row[None]} for row in ids]
    fours = [{"input_ids": rows} for rows in ids.split(4)]
    assert_alike(summed(model, ones), summed(model, fours))


def test_what_is_kept_depends_on_widths_alone() -> None:
    model = family("llama")

    def sizes(data: list[Any]) -> dict[str, Any]:
        moments = summed(model, data, rows=4)
        kept = moments._sums | {str(h): t for h, t in moments._attended.items()}
        assert not any(tensor.requires_grad for tensor in kept.values())
        return {name: tensor.shape for name, tensor in kept.items()}

    small = sizes([{"input_ids": tokens(1, 8)}])
    assert small == sizes([{"input_ids": tokens(6, 40, n)} for n in range(3)])


@pytest.mark.parametrize("name", ["qwen3", "phi"])
def test_no_sum_keeps_a_graph(name: str) -> None:
    """Norms have parameters that want gradients; held on to, every batch would stay in memory."""
    model = made(name)
    assert all(p.requires_grad for p in model.parameters())
    moments = summed(model, [{"input_ids": tokens(2, 8)}])
    assert not any(total.requires_grad for total in moments._sums.values())


def test_few_rows_estimate_all() -> None:
    model = family("llama")
    data = [{"input_ids": tokens(8, 32, n)} for n in range(12)]
    few, whole = (
        summed(model, data, rows=8).get_attended_moments(),
        summed(model, data).get_attended_moments(),
    )
    for head, expected in whole.items():
        off = float((few[head] - expected).norm() / expected.norm())
        assert off < 0.4
        assert float(few[head].trace() / expected.trace()) == pytest.approx(1, abs=0.25)


LAYOUTS: dict[str, Planes] = {
    "llama": make_half_split(8, 8),
    "llama_yarn": make_half_split(8, 8),
    "qwen3": make_half_split(8, 8),
    "cohere": make_interleaved(8, 8),
    "glm4": make_interleaved(8, 4),
    "phi": make_half_split(8, 4),
    "stablelm": make_half_split(8, 2),
    "gpt_neox": make_half_split(8, 4),
    "phi3": make_half_split(8, 8),
    "gpt2": Planes((), tuple(range(8))),
    "opt": Planes((), tuple(range(8))),
    "bert": Planes((), tuple(range(8))),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layouts_are_told_from_what_transformers_does(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype=dtype)
    assert KINDS[name][2].rotated == 2 * len(LAYOUTS[name].pairs)
    moments = summed(model, [{"input_ids": tokens(4, 48)}], layer=0)
    assert moments.layout == LAYOUTS[name]


@pytest.mark.parametrize("name", ["olmo", "nanochat"])
def test_keys_that_are_clamped_or_normed_after_turning_are_refused(name: str) -> None:
    with pytest.raises(SiteError, match="its keys are changed before the attention"):
        summed(family(name), [{"input_ids": tokens(4, 16)}])


def test_numbers_that_are_none_are_refused() -> None:
    model = family("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("inf")
    with pytest.raises(SiteError, match="not finite"):
        summed(model, [{"input_ids": tokens(2, 8)}])


def test_nor_do_they_pass_in_a_later_batch() -> None:
    model = family("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    fine, broken = tokens(2, 8) % 50 + 3, torch.full((2, 8), 60)
    with pytest.raises(SiteError, match="not finite"):
        summed(model, [{"input_ids": fine}, {"input_ids": broken}]).get_value_moments()


def test_data_without_a_real_token_is_refused() -> None:
    data = [{"input_ids": tokens(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}]
    with pytest.raises(SiteError, match="no token of the calibration data is real"):
        summed(family("llama"), data).get_key_moments()


def test_one_position_tells_nothing_about_positions() -> None:
    with pytest.raises(SiteError, match="sequences of one token"):
        summed(family("llama"), [{"input_ids": tokens(8, 1)}])
