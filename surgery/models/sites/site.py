"""The words for one attention block. Plain data: it travels in plans and records as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Packing:
    """How query, key and value lie in the output of one linear map.

    The output is `blocks` runs; each holds, in this `order`, an equal share of every role's heads.

    Attributes:
        order: the roles, as they follow each other.
        blocks: 1 where each role is in one piece (GPT-2, Phi-3); as many as KV heads where each
            lies beside its queries (GPT-NeoX, BLOOM, Falcon).
        grouped: whether `blocks` is the number of KV heads, and follows it.
    """

    order: tuple[str, ...]
    blocks: int
    grouped: bool


@dataclass(frozen=True)
class Projection:
    """A linear map of a site.

    Attributes:
        path: module that holds it.
        in_features, out_features: of the whole module.
        bias: whether it has one.
        unit: features per head: of the output for query, key and value, of the input for output.
        transposed: whether its weight is [in, out] (Conv1D) instead of [out, in].
        packing: how the roles share the module, where they do.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    unit: int
    transposed: bool = False
    packing: Packing | None = None

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
    """One attention block.

    Attributes:
        path: dotted path of the module that attends.
        block: dotted path of the smallest module around it that holds all its projections.
        layer: position among the model's sites, from 0.
        q_heads, kv_heads, head_dim: as the projections' shapes say.
        value_dim: width of a value head; head_dim nearly everywhere.
        hidden_size: width of the block's output.
        cached: whether its keys and values grow while generating.
        window: tokens that a query attends to, its own included; ``None`` for all before it. Of
            cached sites alone, as transformers' own cache takes it from the config.
        cross: whether keys and values come from elsewhere.
        config_prefix: where in the model's config its head counts stand ("" or "text_config.").
    """

    path: str
    block: str
    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    cached: bool
    cross: bool
    config_prefix: str
    window: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def packing(self) -> Packing | None:
        """How the projections share one module; ``None`` where each has its own."""
        return self.query.packing

    def heads(self, role: str) -> int:
        """How many heads a role has."""
        return self.q_heads if role in ("query", "output") else self.kv_heads

    def projection(self, role: str) -> Projection:
        found = getattr(self, role)
        assert isinstance(found, Projection)
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        fields = dict(data)
        for role in (*ROLES, "output"):
            fields[role] = _projection(fields[role])
        for role in ("q_norm", "k_norm"):
            norm = fields[role]
            if norm is not None:
                fields[role] = Norm(norm["path"], norm["size"], tuple(norm["tensors"]))
        return cls(**fields)


def _projection(data: Mapping[str, Any]) -> Projection:
    fields, packing = dict(data), data["packing"]
    if packing is not None:
        fields["packing"] = Packing(tuple(packing["order"]), packing["blocks"], packing["grouped"])
    return Projection(**fields)


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
        unreadable: attention of the model that is not understood.
        left_alone: what no operation is about: linear attention, vision and audio towers.
    """

    model_class: str
    sites: tuple[Site, ...]
    unreadable: tuple[Block, ...]
    left_alone: tuple[Block, ...]
