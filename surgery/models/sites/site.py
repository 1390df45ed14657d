"""The description of one attention block. It is plain data: plans and records hold it as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.config.hints import Count, Size

ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Packing:
    """How query, key and value are packed in the output of one linear map.

    The output has `blocks` equal blocks. Each holds, in this `order`, the same number of heads of
    every role.

    Attributes:
        order: the roles, in their order.
        blocks: 1 if each role is in one piece (GPT-2, Phi-3); the number of KV heads if each of
            them is beside its queries (GPT-NeoX, BLOOM, Falcon).
        grouped: whether `blocks` is always the number of KV heads.
    """

    order: tuple[str, ...]
    blocks: Count
    grouped: bool


@dataclass(frozen=True)
class Projection:
    """A linear map of a site.

    Attributes:
        path: path of the module.
        in_features, out_features: sizes of the whole module.
        bias: whether it has a bias.
        unit: features per head: of the output for query, key and value, of the input for output.
        transposed: whether its weight is [in, out] (Conv1D) instead of [out, in].
        packing: how the roles share the module; ``None`` if they do not.
    """

    path: str
    in_features: Count
    out_features: Count
    bias: bool
    unit: Size
    transposed: bool = False
    packing: Packing | None = None

    @property
    def parameters(self) -> int:
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True)
class Norm:
    """A normalisation of queries or keys before RoPE.

    Attributes:
        size: length of its weight: head_dim if each head is normalised alone, or
            heads * head_dim if all are normalised together.
        tensors: names of its parameters (weight, and bias for a LayerNorm).
    """

    path: str
    size: Count
    tensors: tuple[str, ...] = ("weight",)


@dataclass(frozen=True)
class Site:
    """One attention block.

    Attributes:
        path: dotted path of the module that attends.
        block: dotted path of the smallest module around it that holds all its projections.
        layer: number of the site among the model's sites, from 0.
        q_heads, kv_heads, head_dim: from the shapes of the projections.
        value_dim: width of a value head; nearly always head_dim.
        hidden_size: width of the block's output.
        cached: whether its keys and values are cached during generation.
        window: tokens that a query attends to, its own included; ``None`` for all before it. Only
            for cached sites, as transformers' own cache reads it from the config.
        cross: whether keys and values come from another sequence.
        config_prefix: place of its head counts in the model's config ("" or "text_config.").
    """

    path: str
    block: str
    layer: Size
    q_heads: Count
    kv_heads: Count
    head_dim: Count
    value_dim: Count
    hidden_size: Count
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    cached: bool
    cross: bool
    config_prefix: str
    window: Size | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def packing(self) -> Packing | None:
        """How the projections share one module; ``None`` if each has its own."""
        return self.query.packing

    def count_heads(self, role: str) -> int:
        """Return the number of heads of a role."""
        return self.q_heads if role in ("query", "output") else self.kv_heads

    def get_projection(self, role: str) -> Projection:
        projection = getattr(self, role)
        assert isinstance(projection, Projection)
        return projection

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        fields = dict(data)
        for role in (*ROLES, "output"):
            fields[role] = _parse_projection(fields[role])
        for role in ("q_norm", "k_norm"):
            norm = fields[role]
            if norm is not None:
                fields[role] = Norm(norm["path"], norm["size"], tuple(norm["tensors"]))
        return cls(**fields)


def _parse_projection(data: Mapping[str, Any]) -> Projection:
    fields, packing = dict(data), data["packing"]
    if packing is not None:
        fields["packing"] = Packing(tuple(packing["order"]), packing["blocks"], packing["grouped"])
    return Projection(**fields)


@dataclass(frozen=True)
class Block:
    """An attention block that is not a site, and the reason."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Anatomy:
    """All attention blocks of a model, in module order.

    Attributes:
        sites: the blocks that operations work on.
        unreadable: blocks that are not understood.
        left_alone: blocks that no operation handles: linear attention, vision and audio towers.
    """

    model_class: str
    sites: tuple[Site, ...]
    unreadable: tuple[Block, ...]
    left_alone: tuple[Block, ...]
