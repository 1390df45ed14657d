"""From heads to tensors: what happens to a site's weights when its heads are regrouped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.anatomy import ROLES, Norm, Packing, Projection, Site
from surgery.plan.edits import SiteChange, TensorEdit, TensorSpec

# Per result head, the source heads that become it.
Parts = tuple[tuple[int, ...], ...]


def unchanged(heads: int) -> Parts:
    """Every head stays what it is."""
    return tuple((head,) for head in range(heads))


def kept(heads: Sequence[int]) -> Parts:
    """These heads stay, in this order; the others go."""
    return tuple((head,) for head in heads)


@dataclass(frozen=True)
class Merging:
    """How several heads become one: the arguments of `combine_heads` besides the heads."""

    merge: str = "mean"
    seed: str = ""
    std: float = 0.0

    def arguments(self, name: str) -> dict[str, Any]:
        if self.merge != "random":
            return {"merge": self.merge}
        return {"merge": "random", "seed": f"{self.seed}:{name}", "std": self.std}


def regroup(site: Site, operation: str, query: Parts, kv: Parts, merging: Merging) -> SiteChange:
    """The change that makes `site` have these heads.

    Args:
        query: the query heads afterwards; merging applies to keys and values alone.
        kv: the KV heads afterwards.
    """
    parts = {"query": query, "key": kv, "value": kv}
    edits: list[TensorEdit] = []
    projections: dict[str, Projection] = {}
    if site.packing is None:
        for role in ROLES:
            old = site.projection(role)
            new = replace(old, out_features=old.unit * len(parts[role]))
            projections[role] = new
            edits += _projection_edits(operation, old, old.unit, parts[role], merging)
    else:
        packing = _packing_after(site.packing, len(kv))
        packed = _packed_parts(site, packing, parts)
        old = site.query
        new = replace(old, out_features=old.unit * len(packed), packing=packing)
        projections = dict.fromkeys(ROLES, new)
        edits += _projection_edits(operation, old, old.unit, packed, merging)
    output = site.output
    narrow = replace(output, in_features=output.unit * len(query))
    axis = 0 if output.transposed else 1
    edits += _edit(
        operation, f"{output.path}.weight", axis, output.unit, query, Merging(),
        heads=site.q_heads, rest=output.out_features, fill="zero",
    )  # fmt: skip
    norms: dict[str, Norm | None] = {"q_norm": site.q_norm, "k_norm": site.k_norm}
    for field, heads in (("q_norm", query), ("k_norm", kv)):
        norm = norms[field]
        if norm is not None and norm.size != site.head_dim:
            norms[field] = replace(norm, size=site.head_dim * len(heads))
            # A gain is nothing to draw at random.
            means = Merging() if merging.merge == "random" else merging
            for tensor in norm.tensors:
                name = f"{norm.path}.{tensor}"
                edits += _edit(operation, name, 0, site.head_dim, heads, means,
                               heads=norm.size // site.head_dim)  # fmt: skip
    after = replace(
        site,
        q_heads=len(query),
        kv_heads=len(kv),
        query=projections["query"],
        key=projections["key"],
        value=projections["value"],
        output=narrow,
        q_norm=norms["q_norm"],
        k_norm=norms["k_norm"],
    )
    return SiteChange(before=site, after=after, edits=tuple(edits), query=query, kv=kv)


def dependent_edit(
    change: SiteChange, operation: str, name: str, shape: Sequence[int], axis: int, role: str
) -> TensorEdit:
    """An edit of a tensor that has a share per head, besides the projections.

    Args:
        shape: of the tensor before.
        axis: along which the heads of `role` lie.
    """
    parts = change.query if role == "query" else change.kv
    heads = change.before.heads(role)
    unit = shape[axis] // heads
    result = (*shape[:axis], unit * len(parts), *shape[axis + 1 :])
    return TensorEdit(
        operation=operation,
        transform="combine_heads",
        arguments={
            "axis": axis, "unit": unit, "parts": _plain(parts), "heads": heads, "fill": "source",
            "merge": "mean",
        },
        sources=(TensorSpec(name, tuple(shape)),),
        results=(TensorSpec(name, result),),
    )  # fmt: skip


def order(packing: Packing, q_heads: int, kv_heads: int) -> list[tuple[str, int]]:
    """Role and head of every unit of a packed projection, as they lie in it."""
    counts = {"query": q_heads, "key": kv_heads, "value": kv_heads}
    found = []
    for block in range(packing.blocks):
        for role in packing.order:
            share = counts[role] // packing.blocks
            found += [(role, block * share + number) for number in range(share)]
    return found


def _packing_after(packing: Packing, kv_heads: int) -> Packing:
    return replace(packing, blocks=kv_heads) if packing.grouped else packing


def _packed_parts(site: Site, packing: Packing, parts: dict[str, Parts]) -> Parts:
    assert site.packing is not None
    where = {unit: n for n, unit in enumerate(order(site.packing, site.q_heads, site.kv_heads))}
    after = order(packing, len(parts["query"]), len(parts["key"]))
    return tuple(tuple(where[role, head] for head in parts[role][number]) for role, number in after)


def _projection_edits(
    operation: str, old: Projection, unit: int, parts: Parts, merging: Merging
) -> Iterator[TensorEdit]:
    axis = 1 if old.transposed else 0
    heads = old.out_features // unit
    weight, bias = f"{old.path}.weight", f"{old.path}.bias"
    yield from _edit(operation, weight, axis, unit, parts, merging, heads=heads,
                     rest=old.in_features)  # fmt: skip
    if old.bias:
        yield from _edit(operation, bias, 0, unit, parts, merging, heads=heads)


def _edit(
    operation: str,
    name: str,
    axis: int,
    unit: int,
    parts: Parts,
    merging: Merging,
    *,
    heads: int,
    rest: int | None = None,
    fill: str = "source",
) -> Iterator[TensorEdit]:
    if parts == unchanged(heads):
        return
    before, after = heads * unit, len(parts) * unit
    shapes = [(n,) if rest is None else ((n, rest) if axis == 0 else (rest, n))
              for n in (before, after)]  # fmt: skip
    yield TensorEdit(
        operation=operation,
        transform="combine_heads",
        arguments={"axis": axis, "unit": unit, "parts": _plain(parts), "heads": heads,
                   "fill": fill, **merging.arguments(name)},
        sources=(TensorSpec(name, shapes[0]),),
        results=(TensorSpec(name, shapes[1]),),
    )  # fmt: skip


def _plain(parts: Parts) -> list[list[int]]:
    return [list(part) for part in parts]
