"""How tensors move when a model is converted: nothing is computed, only the layout changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Move:
    """Some tensors of the old model and the tensors that they become in the new model.

    Attributes:
        transform: ``copy``, ``transpose``, ``concat``, ``split``, ``concat_heads`` or
            ``split_heads``: the functions of this module.
        sources, results: names in the old and the new state dict.
        arguments: keyword arguments of the transform, plain JSON.
    """

    transform: str
    sources: tuple[str, ...]
    results: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Move:
        return cls(
            data["transform"],
            tuple(data["sources"]),
            tuple(data["results"]),
            dict(data["arguments"]),
        )


def copy(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors as they are."""
    return list(tensors)


def transpose(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Transpose Conv1D's [in, out] to Linear's [out, in], or back."""
    return [tensor.t().contiguous() for tensor in tensors]


def concat(
    tensors: Sequence[torch.Tensor], *, sizes: Sequence[int], transposed: bool = False
) -> list[torch.Tensor]:
    """Concatenate tensors [n_i, ...] along rows to [sum n_i, ...], then transpose if asked."""
    if [tensor.shape[0] for tensor in tensors] != list(sizes):
        raise ValueError(f"parts have {[t.shape[0] for t in tensors]} rows, not {list(sizes)}")
    whole = torch.cat(list(tensors))
    return [whole.t().contiguous() if transposed else whole]


def split(
    tensors: Sequence[torch.Tensor], *, sizes: Sequence[int], transposed: bool = False
) -> list[torch.Tensor]:
    """Split one tensor [sum n_i, ...], transposed first if asked, into copies [n_i, ...]."""
    (whole,) = tensors
    parts = (whole.t() if transposed else whole).split(list(sizes))
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def concat_heads(tensors: Sequence[torch.Tensor], *, heads: int, parts: int) -> list[torch.Tensor]:
    """Interleave `parts` tensors [heads * d, ...] per head to [heads * parts * d, ...]."""
    rest = tensors[0].shape[1:]
    if len(tensors) != parts:
        raise ValueError(f"{len(tensors)} tensors for {parts} parts")
    interleaved = torch.stack([tensor.reshape(heads, -1, *rest) for tensor in tensors], dim=1)
    return [interleaved.reshape(-1, *rest)]


def split_heads(tensors: Sequence[torch.Tensor], *, heads: int, parts: int) -> list[torch.Tensor]:
    """Split one tensor [heads * parts * d, ...] into `parts` copies [heads * d, ...]."""
    (whole,) = tensors
    rest = whole.shape[1:]
    by_head = whole.reshape(heads, parts, -1, *rest)
    return [by_head[:, part].reshape(-1, *rest).contiguous() for part in range(parts)]


_MOVES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "copy": copy,
    "transpose": transpose,
    "concat": concat,
    "split": split,
    "concat_heads": concat_heads,
    "split_heads": split_heads,
}
_REVERSE = {
    "copy": "copy",
    "transpose": "transpose",
    "concat": "split",
    "split": "concat",
    "concat_heads": "split_heads",
    "split_heads": "concat_heads",
}


def run_move(move: Move, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the results of a move from its sources. Only ``copy`` shares memory with them.

    Raises:
        ValueError, RuntimeError: the tensors do not have the shapes that the move needs.
    """
    return _MOVES[move.transform](tensors, **move.arguments)


def reverse_move(move: Move) -> Move:
    """Return the reverse move: it makes the sources from the results, to the bit."""
    return replace(
        move, transform=_REVERSE[move.transform], sources=move.results, results=move.sources
    )
