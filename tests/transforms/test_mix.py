"""Heads rewritten by coefficients, against loops over heads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.transforms import run_equivalent, run_transform
from surgery.transforms.mix import mix_heads, put_tensor, spread_put_tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@dataclass(repr=False)
class Case:
    source: Tensor
    axis: int
    unit: int
    parts: list[list[int]]
    uses: list[list[int]]
    maps: list[Tensor]

    def head(self, tensor: Tensor, number: int) -> Tensor:
        return tensor.narrow(self.axis, number * self.unit, self.unit).movedim(self.axis, 0)

    @property
    def arguments(self) -> dict[str, object]:
        return {"axis": self.axis, "unit": self.unit, "parts": self.parts, "uses": self.uses}

    def mixed(self) -> Tensor:
        (result,) = mix_heads([self.source, *self.maps], **self.arguments)  # type: ignore[arg-type]
        return result


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any axis; result heads are copies, or made by any of two maps of any source heads."""
    heads, unit = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rest = draw(st.lists(st.integers(1, 3), max_size=2))
    axis = draw(st.integers(0, len(rest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (*rest[:axis], heads * unit, *rest[axis:])
    source = torch.randn(shape, generator=generator, dtype=torch.float64)
    sizes = [draw(st.integers(1, heads)), draw(st.integers(1, heads))]  # members of each map
    maps = [torch.randn(3, unit, n * unit, generator=generator) for n in sizes]
    parts, uses = [], []
    for _ in range(draw(st.integers(1, 5))):
        which = draw(st.sampled_from([None, 0, 1]))
        count = 1 if which is None else sizes[which]
        parts.append(draw(st.permutations(range(heads)))[:count])
        uses.append([] if which is None else [which, draw(st.integers(0, 2))])
    return Case(source.to(draw(st.sampled_from(DTYPES))), axis, unit, parts, uses, maps)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_every_result_head_is_its_map_of_its_members(case: Case) -> None:
    result = case.mixed()
    assert result.dtype == case.source.dtype
    assert result.is_contiguous()
    assert result.shape[case.axis] == len(case.parts) * case.unit
    eps = torch.finfo(case.source.dtype).eps
    for number, (part, use) in enumerate(zip(case.parts, case.uses, strict=True)):
        members = torch.cat([case.head(case.source, head) for head in part])
        found = case.head(result, number)
        if not use:
            assert torch.equal(found, members)
            continue
        coefficients = case.maps[use[0]][use[1]].double()
        flat = members.double().reshape(len(members), -1)
        expected = (coefficients @ flat).view(found.shape)
        size = (coefficients.abs() @ flat.abs()).view(found.shape)
        bound = expected.abs() * eps + 1e-5 * size + torch.finfo(case.source.dtype).tiny
        assert ((found.double() - expected).abs() <= bound).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_the_source_stays_and_the_same_again_is_the_same_to_the_bit(case: Case) -> None:
    before = case.source.clone()
    first = case.mixed()
    assert torch.equal(first, case.mixed())
    first.zero_()
    assert torch.equal(case.source, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_shapes_are_known_without_numbers(case: Case) -> None:
    tensors = [t.to("meta") for t in (case.source, *case.maps)]
    (result,) = mix_heads(tensors, **case.arguments)  # type: ignore[arg-type]
    assert (result.shape, result.dtype) == (case.mixed().shape, case.source.dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_gradients_reach_the_maps(case: Case) -> None:
    used = {use[0] for use in case.uses if use}
    case.maps = [tensor.requires_grad_() for tensor in case.maps]
    result = case.mixed()
    assert result.requires_grad == bool(used)
    if used:
        result.float().sum().backward()
        for number, tensor in enumerate(case.maps):
            assert (tensor.grad is not None) == (number in used)


def test_the_identity_is_a_copy_to_the_bit() -> None:
    source = torch.randn(8, 5)
    eye = torch.eye(2).expand(4, 2, 2)
    (result,) = mix_heads(
        [source, eye], axis=0, unit=2, parts=[[0], [1], [2], [3]], uses=[[0, n] for n in range(4)]
    )
    assert torch.equal(result, source)


@pytest.mark.parametrize("columns", [(), (5,)])
def test_where_the_maps_lie_in_memory_changes_no_bit(columns: tuple[int, ...]) -> None:
    """Read from a file they start at any fourth byte, and fast products depend on that."""
    source, maps = torch.randn(64, *columns), torch.randn(4, 8, 16)
    arguments = {
        "axis": 0,
        "unit": 8,
        "parts": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "uses": [[0, n] for n in range(4)],
    }
    found = [
        run_transform("mix_heads", [source, _moved(maps, by)], arguments)[0] for by in range(16)
    ]
    assert all(torch.equal(one, found[0]) for one in found)


def _moved(tensor: Tensor, by: int) -> Tensor:
    memory = torch.empty(tensor.numel() + by)
    return memory[by:].view(tensor.shape).copy_(tensor)


def test_doubles_are_mixed_as_doubles() -> None:
    source = torch.tensor([[1.0], [1e-12]], dtype=torch.float64)
    (result,) = mix_heads(
        [source, torch.tensor([[[1.0, 1.0]]])], axis=0, unit=1, parts=[[0, 1]], uses=[[0, 0]]
    )
    assert result.item() == 1.0 + 1e-12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"unit": 3}, "8 along axis 0 is not a multiple of 3"),
        ({"parts": [[4, 0]]}, "heads that do not exist: there are 4"),
        ({"parts": [[-1, 0]]}, "heads that do not exist: there are 4"),
        ({"parts": [[0]]}, "a map has shape"),
        ({"parts": [[0, 1], [2, 3]]}, "argument 2 is shorter|shorter"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], said: str) -> None:
    given = {"axis": 0, "unit": 2, "parts": [[0, 1]], "uses": [[0, 0]], **arguments}
    with pytest.raises(ValueError, match=said):
        mix_heads([torch.ones(8, 2), torch.ones(1, 2, 4)], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_tensor_takes_the_place_and_the_dtype_of_the_source(dtype: torch.dtype) -> None:
    source, made = torch.zeros(4, 6, dtype=dtype), torch.randn(4, 2)
    (result,) = put_tensor([source, made], axis=1, unit=2, parts=[[0]], fill="zero")
    assert result.dtype == dtype
    assert torch.equal(result, made.to(dtype))
    result.zero_()
    assert made.all()  # the plan keeps its own


def test_what_stands_for_a_given_tensor_in_the_old_shape() -> None:
    source, made = torch.ones(4, 6), torch.randn(4, 4)
    arguments = {"axis": 1, "unit": 2, "parts": [[2], [0]], "fill": "zero"}
    results = run_transform("put_tensor", [source, made], arguments)
    (wide,) = run_equivalent("put_tensor", results, [source], arguments)
    assert torch.equal(wide, torch.cat([made[:, 2:], torch.zeros(4, 2), made[:, :2]], dim=1))
    (bias,) = spread_put_tensor([torch.arange(4.0)], [torch.zeros(4)])
    assert torch.equal(bias, torch.arange(4.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_spread_again_every_member_is_its_result(case: Case) -> None:
    named = [head for part in case.parts for head in part]
    if len(set(named)) != len(named):
        return
    result = case.mixed()
    arguments = case.arguments | {"fill": "source"}
    (wide,) = run_equivalent("mix_heads", [result], [case.source], arguments)
    assert wide.shape == case.source.shape
    for number, part in enumerate(case.parts):
        for head in part:
            assert torch.equal(case.head(wide, head), case.head(result, number))
