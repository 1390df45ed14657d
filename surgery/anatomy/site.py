"""The words for one attention block. Plain data: it travels in plans and records as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Projection:
    """A linear map of a site; its weight is [out_features, in_features]."""

    path: str
    in_features: int
    out_features: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True)
class Norm:
    """A normalisation of queries or keys before RoPE.

    Attributes:
        size: length of its weight: head_dim where each head is normalised alone, or
            heads * head_dim where all are normalised together.
        tensors: names of its parameters (weight, and bias for a LayerNorm).
    """

    path: str
    size: int
    tensors: tuple[str, ...] = ("weight",)


@dataclass(frozen=True)
class Site:
    """One attention block with separate query, key, value and output projections.

    Attributes:
        path: dotted module path.
        layer: position among the model's sites, from 0.
        q_heads, kv_heads, head_dim: as the projections' shapes say.
        hidden_size: width of the block's input and output.
        groupable: whether its forward lets several query heads share a KV head.
        cached: whether it keeps keys and values while generating.
        config_prefix: where in the model's config its head counts stand ("" or "text_config.").
    """

    path: str
    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    groupable: bool
    cached: bool
    config_prefix: str

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        fields = dict(data)
        for role in ("query", "key", "value", "output"):
            fields[role] = Projection(**fields[role])
        for role in ("q_norm", "k_norm"):
            norm = fields[role]
            if norm is not None:
                fields[role] = Norm(norm["path"], norm["size"], tuple(norm["tensors"]))
        return cls(**fields)


@dataclass(frozen=True)
class Block:
    """An attention block that is no site, and why."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Anatomy:
    """All attention blocks of a model, in module order.

    Attributes:
        sites: what operations work on.
        unreadable: attention of the text model that is not understood.
        left_alone: what no operation is about: linear attention, vision and audio towers.
    """

    model_class: str
    sites: tuple[Site, ...]
    unreadable: tuple[Block, ...]
    left_alone: tuple[Block, ...]
