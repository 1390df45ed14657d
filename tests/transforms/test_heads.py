"""The arithmetic on bare tensors, against loops over heads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.transforms import (
    EQUIVALENTS,
    TRANSFORMS,
    combine_heads,
    run_equivalent,
    run_transform,
    spread_heads,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MERGES = ["mean", "first", "random"]


@dataclass
class Case:
    """A random tensor, and heads of it to combine."""

    source: Tensor
    axis: int
    unit: int
    parts: list[list[int]]
    merge: str

    @property
    def heads(self) -> int:
        return self.source.shape[self.axis] // self.unit

    def head(self, tensor: Tensor, number: int) -> Tensor:
        return tensor.narrow(self.axis, number * self.unit, self.unit)

    def combined(self) -> Tensor:
        (result,) = combine_heads(
            [self.source],
            axis=self.axis,
            unit=self.unit,
            parts=self.parts,
            heads=self.heads,
            merge=self.merge,
            seed="s",
            std=0.1,
        )
        return result


@st.composite
def cases(draw: st.DrawFn, *, merges: list[str] = MERGES, whole: bool = False) -> Case:
    """Any axis, any number of heads; parts name any of them, each at most once.

    Args:
        whole: whether every head is named.
    """
    heads, unit = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    rest = draw(st.lists(st.integers(1, 3), max_size=2))
    axis = draw(st.integers(0, len(rest)))
    shape = (*rest[:axis], heads * unit, *rest[axis:])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    source = torch.randn(shape, generator=generator, dtype=torch.float64)
    named = draw(st.permutations(range(heads)))
    if not whole:
        named = named[: draw(st.integers(1, heads))]
    cuts = sorted(draw(st.sets(st.integers(1, len(named)), max_size=3)) - {len(named)})
    bounds = zip([0, *cuts], [*cuts, len(named)], strict=True)
    parts = [list(named[start:end]) for start, end in bounds]
    merge = draw(st.sampled_from(merges))
    return Case(source.to(draw(st.sampled_from(DTYPES))), axis, unit, parts, merge)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_spread_again_a_result_stands_wherever_one_of_its_sources_stood(case: Case) -> None:
    result = case.combined()
    (wide,) = spread_heads(
        [result], [case.source], axis=case.axis, unit=case.unit, parts=case.parts
    )
    assert wide.shape == case.source.shape
    assert wide.dtype == case.source.dtype
    where = {head: number for number, part in enumerate(case.parts) for head in part}
    for head in range(case.heads):
        found = case.head(wide, head)
        if head in where:
            assert torch.equal(found, case.head(result, where[head]))
        else:
            assert torch.equal(found, case.head(case.source, head))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_what_went_is_zero_where_it_is_read(case: Case) -> None:
    (wide,) = spread_heads(
        [case.combined()],
        [case.source],
        axis=case.axis,
        unit=case.unit,
        parts=case.parts,
        fill="zero",
    )
    for head in set(range(case.heads)) - {head for part in case.parts for head in part}:
        assert not case.head(wide, head).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(whole=True))
def test_every_head_alone_is_the_identity_to_the_bit(case: Case) -> None:
    case.parts = [[head] for head in range(case.heads)]
    result = case.combined()
    assert torch.equal(result, case.source)
    assert result.data_ptr() != case.source.data_ptr()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_kept_heads_are_copies_in_their_new_order(case: Case) -> None:
    order = [head for part in case.parts for head in part]
    case.parts = [[head] for head in order]
    result = case.combined()
    assert result.shape[case.axis] == len(order) * case.unit
    for number, head in enumerate(order):
        assert torch.equal(case.head(result, number), case.head(case.source, head))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(merges=["mean"]))
def test_means_are_rounded_once(case: Case) -> None:
    result = case.combined()
    eps = torch.finfo(case.source.dtype).eps
    wide = eps if case.source.dtype == torch.float64 else torch.finfo(torch.float32).eps
    tiny = torch.finfo(case.source.dtype).smallest_normal * eps  # where numbers lie that far apart
    for number, part in enumerate(case.parts):
        members = torch.stack([case.head(case.source, head).double() for head in part])
        mean, size = members.mean(0), members.abs().sum(0)
        # Half a unit in the last place, and the rounding of a sum in fp32 (or fp64).
        bound = mean.abs() * eps / 2 + 2 * wide * size + tiny
        assert ((case.head(result, number).double() - mean).abs() <= bound).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(merges=["first"]))
def test_first_takes_the_first_that_a_part_names(case: Case) -> None:
    result = case.combined()
    for number, part in enumerate(case.parts):
        assert torch.equal(case.head(result, number), case.head(case.source, part[0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_dtype_and_source_are_kept(case: Case) -> None:
    before = case.source.clone()
    result = case.combined()
    assert (result.dtype, result.is_contiguous()) == (case.source.dtype, True)
    result.zero_()
    assert torch.equal(case.source, before)  # no view of it was handed out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(whole=True, merges=["mean"]))
def test_combining_undoes_spreading_of_equal_heads(case: Case) -> None:
    case.merge = "first"
    narrow = case.combined()
    (wide,) = spread_heads(
        [narrow], [case.source], axis=case.axis, unit=case.unit, parts=case.parts
    )
    again = Case(wide, case.axis, case.unit, case.parts, "mean").combined()
    eps = torch.finfo(wide.dtype).eps
    torch.testing.assert_close(again.double(), narrow.double(), rtol=2 * eps, atol=0)


def test_half_precision_is_summed_in_fp32() -> None:
    # In fp16 the sum alone would overflow.
    tensor = torch.full((4, 1), 60_000.0, dtype=torch.float16)
    (mean,) = combine_heads([tensor], axis=0, unit=1, parts=[[0, 1, 2, 3]])
    assert mean.tolist() == [[60_000.0]]


class TestRandom:
    def drawn(self, seed: str = "s", std: float = 0.5, *rest: int) -> Tensor:
        source = torch.zeros(512, *(rest or (16,)))
        (result,) = combine_heads(
            [source], axis=0, unit=128, parts=[[0, 1], [2, 3]], merge="random", seed=seed, std=std
        )
        return result

    def test_the_seed_says_which_bits(self) -> None:
        assert torch.equal(self.drawn(), self.drawn())
        assert not torch.equal(self.drawn(), self.drawn("t"))

    def test_no_two_heads_are_alike_and_they_are_spread_as_told(self) -> None:
        drawn = self.drawn()
        assert not torch.equal(drawn[:128], drawn[128:])
        assert abs(float(drawn.std()) / 0.5 - 1) < 5 / (2 * drawn.numel()) ** 0.5
        assert abs(float(drawn.mean())) < 5 * 0.5 / drawn.numel() ** 0.5

    def test_a_head_that_merges_nothing_is_not_drawn(self) -> None:
        source = torch.arange(6.0).view(6, 1)
        (result,) = combine_heads(
            [source], axis=0, unit=2, parts=[[2], [0, 1]], merge="random", seed="s", std=1.0
        )
        assert result[:2].flatten().tolist() == [4.0, 5.0]

    def test_vectors_are_zero(self) -> None:
        (result,) = combine_heads(
            [torch.ones(4)], axis=0, unit=2, parts=[[0, 1]], merge="random", seed="s", std=1.0
        )
        assert result.tolist() == [0.0, 0.0]

    def test_nothing_is_drawn_on_the_meta_device(self) -> None:
        (result,) = combine_heads(
            [torch.empty(8, 3, device="meta")],
            axis=0,
            unit=2,
            parts=[[0, 1, 2, 3]],
            merge="random",
            seed="s",
            std=1.0,
        )
        assert (result.shape, result.device.type) == ((2, 3), "meta")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"merge": "median"}, "unknown merge 'median'"),
        ({"unit": 3}, "8 along axis 0 is not a multiple of 3"),
        ({"heads": 3}, "4 heads, not 3"),
        ({"parts": [[0], [4]]}, "heads that do not exist: there are 4"),
        ({"parts": [[-1]]}, "heads that do not exist: there are 4"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        combine_heads([torch.ones(8, 2)], **{"axis": 0, "unit": 2, "parts": [[0]], **arguments})


def test_every_transform_has_an_equivalent_in_the_old_shape() -> None:
    assert set(TRANSFORMS) == set(EQUIVALENTS)
    source = torch.randn(8, 3)
    arguments = {"axis": 0, "unit": 2, "parts": [[0, 1], [3]], "merge": "mean", "fill": "zero"}
    results = run_transform("combine_heads", [source], arguments)
    (wide,) = run_equivalent("combine_heads", results, [source], arguments)
    assert wide.shape == (8, 3)
    assert torch.equal(wide[:2], wide[2:4])
    assert not wide[4:6].any()
