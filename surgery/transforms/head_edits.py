"""From heads to tensors: what happens to a site's weights when its heads are regrouped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.models.sites import ROLES, Norm, Packing, Projection, Site
from surgery.transforms.edits import Parts, SiteChange, TensorEdit, TensorSpec


def unchanged(heads: int) -> Parts:
    """Every head stays what it is."""
    return tuple((head,) for head in range(heads))


def keep_heads(heads: Sequence[int]) -> Parts:
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


@dataclass(frozen=True)
class Rewrite:
    """How calibrated tensors make a site's new heads; they are named after role and `prefix`.

    query, key, value: a map [result heads, unit, members * unit] each, for the rows of weight and
    bias. output: its whole weight in the architecture's layout. output_bias: that bias.

    Attributes:
        bias: whether the output projection's bias is made anew too.
        output_only: whether the output projection alone is made anew.
    """

    prefix: str
    bias: bool
    output_only: bool = False

    def name(self, role: str) -> str:
        return f"{self.prefix}.{role}"


def regroup(
    site: Site,
    operation: str,
    query: Parts,
    kv: Parts,
    merging: Merging,
    rewrite: Rewrite | None = None,
) -> SiteChange:
    """The change that makes `site` have these heads.

    Args:
        query: the query heads afterwards; merging applies to keys and values alone.
        kv: the KV heads afterwards.
        rewrite: calibrated tensors that do it in place of `merging`.
    """
    parts = {"query": query, "key": kv, "value": kv}
    specs = {} if rewrite is None else rewrite_specs(site, rewrite, query, kv)
    mixes = rewrite is not None and not rewrite.output_only
    edits: list[TensorEdit] = []
    projections: dict[str, Projection] = {}
    if site.packing is None:
        for role in ROLES:
            old = site.get_projection(role)
            new = replace(old, out_features=old.unit * len(parts[role]))
            projections[role] = new
            if not mixes:
                edits += _projection_edits(operation, old, old.unit, parts[role], merging)
            else:
                uses = [(0, number) for number in range(len(parts[role]))]
                edits += _mix_edits(operation, old, parts[role], [specs[role]], uses)
    else:
        packing = _packing_after(site.packing, len(kv))
        packed = _packed_parts(site, packing, parts)
        old = site.query
        new = replace(old, out_features=old.unit * len(packed), packing=packing)
        projections = dict.fromkeys(ROLES, new)
        if not mixes:
            edits += _projection_edits(operation, old, old.unit, packed, merging)
        else:
            after_order = order(packing, len(query), len(kv))
            uses = [(ROLES.index(role), number) for role, number in after_order]
            edits += _mix_edits(operation, old, packed, [specs[role] for role in ROLES], uses)
    output = site.output
    narrow = replace(output, in_features=output.unit * len(query))
    axis = 0 if output.transposed else 1
    if rewrite is None:
        edits += _edit(
            operation,
            f"{output.path}.weight",
            axis,
            output.unit,
            query,
            Merging(),
            heads=site.q_heads,
            rest=output.out_features,
            fill="zero",
        )
    else:
        edits += _output_edits(operation, output, axis, query, specs)
    norms: dict[str, Norm | None] = {"q_norm": site.q_norm, "k_norm": site.k_norm}
    for field, heads in (("q_norm", query), ("k_norm", kv)):
        norm = norms[field]
        if norm is not None and norm.size != site.head_dim:
            norms[field] = replace(norm, size=site.head_dim * len(heads))
            # A gain is nothing to draw at random.
            means = Merging() if merging.merge == "random" else merging
            for tensor in norm.tensors:
                name = f"{norm.path}.{tensor}"
                edits += _edit(
                    operation,
                    name,
                    0,
                    site.head_dim,
                    heads,
                    means,
                    heads=norm.size // site.head_dim,
                )
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


def rewrite_specs(site: Site, rewrite: Rewrite, query: Parts, kv: Parts) -> dict[str, TensorSpec]:
    """Role → name and shape of the tensor that calibration makes for it."""
    shapes: dict[str, tuple[int, ...]] = {}
    mixed = () if rewrite.output_only else (("query", query), ("key", kv), ("value", kv))
    for role, parts in mixed:
        unit = site.get_projection(role).unit
        shapes[role] = (len(parts), unit, len(parts[0]) * unit)
    output = site.output
    wide = output.unit * len(query)
    shapes["output"] = (
        (wide, output.out_features) if output.transposed else (output.out_features, wide)
    )
    if rewrite.bias:
        shapes["output_bias"] = (output.out_features,)
    return {role: TensorSpec(rewrite.name(role), shape) for role, shape in shapes.items()}


def dependent_edit(
    change: SiteChange, operation: str, name: str, shape: Sequence[int], axis: int, role: str
) -> TensorEdit:
    """An edit of a tensor that has a share per head, besides the projections.

    Args:
        shape: of the tensor before.
        axis: along which the heads of `role` lie.
    """
    parts = change.query if role == "query" else change.kv
    heads = change.before.count_heads(role)
    unit = shape[axis] // heads
    result = (*shape[:axis], unit * len(parts), *shape[axis + 1 :])
    return TensorEdit(
        operation=operation,
        transform="combine_heads",
        arguments={
            "axis": axis,
            "unit": unit,
            "parts": _plain(parts),
            "heads": heads,
            "fill": "source",
            "merge": "mean",
        },
        sources=(TensorSpec(name, tuple(shape)),),
        results=(TensorSpec(name, result),),
    )


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
    yield from _edit(
        operation, weight, axis, unit, parts, merging, heads=heads, rest=old.in_features
    )
    if old.bias:
        yield from _edit(operation, bias, 0, unit, parts, merging, heads=heads)


def _mix_edits(
    operation: str,
    old: Projection,
    parts: Parts,
    maps: Sequence[TensorSpec],
    uses: Sequence[tuple[int, int]],
) -> Iterator[TensorEdit]:
    after = old.unit * len(parts)
    weight = (old.out_features, old.in_features), (after, old.in_features)
    if old.transposed:
        weight = weight[0][::-1], weight[1][::-1]
    shapes = {"weight": weight, "bias": ((old.out_features,), (after,))}
    for tensor, (before, made) in shapes.items():
        if tensor == "bias" and not old.bias:
            continue
        name = f"{old.path}.{tensor}"
        yield TensorEdit(
            operation=operation,
            transform="mix_heads",
            arguments={
                "axis": 1 if old.transposed and tensor == "weight" else 0,
                "unit": old.unit,
                "parts": _plain(parts),
                "uses": [list(use) for use in uses],
                "fill": "source",
            },
            sources=(TensorSpec(name, before),),
            results=(TensorSpec(name, made),),
            resolved=tuple(maps),
        )


def _output_edits(
    operation: str, output: Projection, axis: int, query: Parts, specs: Mapping[str, TensorSpec]
) -> Iterator[TensorEdit]:
    made = specs["output"]
    before = (output.out_features, output.in_features)
    yield TensorEdit(
        operation=operation,
        transform="put_tensor",
        arguments={"axis": axis, "unit": output.unit, "parts": _plain(query), "fill": "zero"},
        sources=(TensorSpec(f"{output.path}.weight", before[::-1] if axis == 0 else before),),
        results=(TensorSpec(f"{output.path}.weight", made.shape),),
        resolved=(made,),
    )
    if "output_bias" in specs:
        bias = TensorSpec(f"{output.path}.bias", (output.out_features,))
        yield TensorEdit(
            operation=operation,
            transform="put_tensor",
            arguments={},
            sources=(bias,),
            results=(bias,),
            resolved=(specs["output_bias"],),
        )


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
    shapes = [
        (n,) if rest is None else ((n, rest) if axis == 0 else (rest, n)) for n in (before, after)
    ]
    yield TensorEdit(
        operation=operation,
        transform="combine_heads",
        arguments={
            "axis": axis,
            "unit": unit,
            "parts": _plain(parts),
            "heads": heads,
            "fill": fill,
            **merging.arguments(name),
        },
        sources=(TensorSpec(name, shapes[0]),),
        results=(TensorSpec(name, shapes[1]),),
    )


def _plain(parts: Parts) -> list[list[int]]:
    return [list(part) for part in parts]
