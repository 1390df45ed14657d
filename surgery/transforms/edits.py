"""The smallest parts of a plan: tensors, edits of tensors, and the change of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from surgery.config.hints import Size
from surgery.models.sites import Site

# Per head of the result, the heads of the source that become it.
Parts = tuple[tuple[Size, ...], ...]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor by its name in the state dict."""

    name: str
    shape: tuple[Size, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TensorEdit:
    """Result tensors as a pure function of source tensors.

    Attributes:
        transform: a name in `surgery.transforms`.
        arguments: its keyword arguments, plain JSON.
        resolved: tensors that calibration makes; the plan holds them.
    """

    operation: str
    transform: str
    arguments: Mapping[str, Any]
    sources: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    resolved: tuple[TensorSpec, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorEdit:
        return cls(
            operation=data["operation"],
            transform=data["transform"],
            arguments=dict(data["arguments"]),
            sources=_parse_specs(data["sources"]),
            results=_parse_specs(data["results"]),
            resolved=_parse_specs(data["resolved"]),
        )


def _parse_specs(data: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec["name"], tuple(spec["shape"])) for spec in data)


@dataclass(frozen=True)
class SiteChange:
    """One operation at one site.

    Attributes:
        query, kv: per head of the result, the heads of the source that become it.
    """

    before: Site
    after: Site
    edits: tuple[TensorEdit, ...]
    query: Parts
    kv: Parts

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "edits": [asdict(edit) for edit in self.edits],
            "query": [list(part) for part in self.query],
            "kv": [list(part) for part in self.kv],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiteChange:
        return cls(
            before=Site.from_json(data["before"]),
            after=Site.from_json(data["after"]),
            edits=tuple(TensorEdit.from_json(edit) for edit in data["edits"]),
            query=tuple(tuple(part) for part in data["query"]),
            kv=tuple(tuple(part) for part in data["kv"]),
        )
