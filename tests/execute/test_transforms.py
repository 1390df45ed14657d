"""The arithmetic on bare tensors, against loops over heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.execute.transforms import (
    EQUIVALENTS,
    TRANSFORMS,
    pool_heads,
    repeat_heads,
    run_equivalent,
    run_transform,
)

COUNTS = [(1, 1), (2, 1), (6, 2), (6, 3), (8, 8), (8, 4), (8, 1)]


def source(heads: int, dim: int, *rest: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads * 100 + dim)
    return torch.randn(heads * dim, *rest, generator=generator, dtype=torch.float64).to(dtype)


def head(tensor: torch.Tensor, number: int, dim: int) -> torch.Tensor:
    return tensor[number * dim : (number + 1) * dim]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(COUNTS), st.integers(1, 5), st.sampled_from([(), (7,)]))
def test_each_new_head_is_the_mean_of_its_neighbours(
    counts: tuple[int, int], dim: int, rest: tuple[int, ...]
) -> None:
    heads, groups = counts
    tensor = source(heads, dim, *rest)
    (pooled,) = pool_heads([tensor], heads=heads, groups=groups, merge="mean")
    assert pooled.shape == (groups * dim, *rest)
    size = heads // groups
    for group in range(groups):
        members = [head(tensor, group * size + m, dim) for m in range(size)]
        expected = sum(members[1:], members[0]) / size
        torch.testing.assert_close(head(pooled, group, dim), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("heads", "groups"), COUNTS)
def test_first_takes_the_first_of_each_group(heads: int, groups: int) -> None:
    tensor = source(heads, 3, 4, dtype=torch.bfloat16)
    (pooled,) = pool_heads([tensor], heads=heads, groups=groups, merge="first")
    for group in range(groups):
        assert torch.equal(head(pooled, group, 3), head(tensor, group * heads // groups, 3))


@pytest.mark.parametrize("merge", ["mean", "first", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_source_are_kept(merge: str, dtype: torch.dtype) -> None:
    tensor = source(4, 2, 3, dtype=dtype)
    before = tensor.clone()
    (pooled,) = pool_heads([tensor], heads=4, groups=2, merge=merge, seed="s", std=0.1)
    assert (pooled.dtype, pooled.is_contiguous()) == (dtype, True)
    pooled.zero_()
    assert torch.equal(tensor, before)  # no view of it was handed out


def test_half_precision_is_summed_in_fp32() -> None:
    # In fp16 the sum alone would overflow.
    tensor = torch.full((4, 1), 60_000.0, dtype=torch.float16)
    (pooled,) = pool_heads([tensor], heads=4, groups=1, merge="mean")
    assert pooled.tolist() == [[60_000.0]]


@pytest.mark.parametrize(("heads", "groups"), COUNTS)
def test_repeating_undoes_pooling_of_equal_heads(heads: int, groups: int) -> None:
    (wide,) = repeat_heads([source(groups, 3, 4)], heads=heads, groups=groups)
    assert wide.shape == (heads * 3, 4)
    size = heads // groups
    for number in range(heads):
        assert torch.equal(head(wide, number, 3), head(wide, number // size * size, 3))
    (pooled,) = pool_heads([wide], heads=heads, groups=groups, merge="mean")
    torch.testing.assert_close(pooled, source(groups, 3, 4), rtol=0, atol=1e-15)


def test_an_unknown_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown merge 'median'"):
        pool_heads([source(2, 1)], heads=2, groups=1, merge="median")


def test_every_transform_has_an_equivalent_in_the_old_shape() -> None:
    assert set(TRANSFORMS) == set(EQUIVALENTS)
    arguments = {"heads": 4, "groups": 2, "merge": "mean"}
    results = run_transform("pool_heads", [source(4, 2, 3)], arguments)
    (wide,) = run_equivalent("pool_heads", results, arguments)
    assert wide.shape == (8, 3)


def test_nothing_is_drawn_on_the_meta_device() -> None:
    (pooled,) = pool_heads(
        [torch.empty(8, 3, device="meta")], heads=4, groups=1, merge="random", seed="s", std=1.0
    )
    assert (pooled.shape, pooled.device.type) == ((2, 3), "meta")
