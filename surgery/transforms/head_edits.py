"""Make the tensor edits of a site whose heads are regrouped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.models.sites import ROLES, Norm, Packing, Projection, Site
from surgery.transforms.edits import Parts, SiteChange, TensorEdit, TensorSpec


def keep_all_heads(heads: int) -> Parts:
    """Keep every head as it is."""
    return tuple((head,) for head in range(heads))


def keep_heads(heads: Sequence[int]) -> Parts:
    """Keep these heads in this order, and remove the others."""
    return tuple((head,) for head in heads)


def repeat_heads(heads: int, results: int) -> Parts:
    """Repeat every head so that there are `results`, a multiple; the same ones are neighbours."""
    return tuple((head * heads // results,) for head in range(results))


@dataclass(frozen=True)
class Merging:
    """How several heads become one: the arguments of `combine_heads` besides the heads."""

    merge: str = "mean"
    seed: str = ""
    std: float = 0.0

    def make_arguments(self, name: str) -> dict[str, Any]:
        if self.merge != "random":
            return {"merge": self.merge}
        return {"merge": "random", "seed": f"{self.seed}:{name}", "std": self.std}


@dataclass(frozen=True)
class Rewrite:
    """The calibrated tensors that make the new heads of a site.

    For query, key and value there is a map [result heads, unit, members * unit], for the rows of
    weight and bias. For output there is the whole weight in the architecture's layout, and for
    output_bias the bias.

    Attributes:
        prefix: start of the tensors' names, before the role.
        bias: whether the output projection gets a new bias too.
        output_only: whether only the output projection is new.
    """

    prefix: str
    bias: bool
    output_only: bool = False

    def name_tensor(self, role: str) -> str:
        return f"{self.prefix}.{role}"


def regroup(
    site: Site,
    operation: str,
    query: Parts,
    kv: Parts,
    merging: Merging,
    rewrite: Rewrite | None = None,
) -> SiteChange:
    """Make the change that gives `site` these heads.

    Args:
        query: the new query heads; `merging` applies only to keys and values.
        kv: the new KV heads.
        rewrite: calibrated tensors that are used instead of `merging`.
    """
    parts = {"query": query, "key": kv, "value": kv}
    specs = {} if rewrite is None else make_rewrite_specs(site, rewrite, query, kv)
    mixes = rewrite is not None and not rewrite.output_only
    edits: list[TensorEdit] = []
    projections: dict[str, Projection] = {}
    if site.packing is None:
        for role in ROLES:
            old = site.get_projection(role)
            new = replace(old, out_features=old.unit * len(parts[role]))
            projections[role] = new
            if not mixes:
                edits += _edit_projection(operation, old, old.unit, parts[role], merging)
            else:
                uses = [(0, number) for number in range(len(parts[role]))]
                edits += _mix_projection(operation, old, parts[role], [specs[role]], uses)
    else:
        packing = _update_packing(site.packing, len(kv))
        packed = _make_packed_parts(site, packing, parts)
        old = site.query
        new = replace(old, out_features=old.unit * len(packed), packing=packing)
        projections = dict.fromkeys(ROLES, new)
        if not mixes:
            edits += _edit_projection(operation, old, old.unit, packed, merging)
        else:
            after_order = list_units(packing, len(query), len(kv))
            uses = [(ROLES.index(role), number) for role, number in after_order]
            edits += _mix_projection(operation, old, packed, [specs[role] for role in ROLES], uses)
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
        edits += _replace_output(operation, output, axis, query, specs)
    norms: dict[str, Norm | None] = {"q_norm": site.q_norm, "k_norm": site.k_norm}
    for field, heads in (("q_norm", query), ("k_norm", kv)):
        norm = norms[field]
        if norm is not None and norm.size != site.head_dim:
            norms[field] = replace(norm, size=site.head_dim * len(heads))
            # The weights of a norm are never drawn at random.
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


def make_rewrite_specs(
    site: Site, rewrite: Rewrite, query: Parts, kv: Parts
) -> dict[str, TensorSpec]:
    """Make role → name and shape of the tensor that calibration makes for it."""
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
    return {role: TensorSpec(rewrite.name_tensor(role), shape) for role, shape in shapes.items()}


def make_dependent_edit(
    change: SiteChange, operation: str, name: str, shape: Sequence[int], axis: int, role: str
) -> TensorEdit:
    """Make an edit of a tensor that has a part per head and is not a projection.

    Args:
        shape: shape of the tensor before the edit.
        axis: the axis along which the heads of `role` lie.
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
            "parts": _to_lists(parts),
            "heads": heads,
            "fill": "source",
            "merge": "mean",
        },
        sources=(TensorSpec(name, tuple(shape)),),
        results=(TensorSpec(name, result),),
    )


def list_units(packing: Packing, q_heads: int, kv_heads: int) -> list[tuple[str, int]]:
    """List role and head of every unit of a packed projection, in their order."""
    counts = {"query": q_heads, "key": kv_heads, "value": kv_heads}
    units = []
    for block in range(packing.blocks):
        for role in packing.order:
            size = counts[role] // packing.blocks
            units += [(role, block * size + number) for number in range(size)]
    return units


def _update_packing(packing: Packing, kv_heads: int) -> Packing:
    return replace(packing, blocks=kv_heads) if packing.grouped else packing


def _make_packed_parts(site: Site, packing: Packing, parts: dict[str, Parts]) -> Parts:
    assert site.packing is not None
    where = {
        unit: n for n, unit in enumerate(list_units(site.packing, site.q_heads, site.kv_heads))
    }
    after = list_units(packing, len(parts["query"]), len(parts["key"]))
    return tuple(tuple(where[role, head] for head in parts[role][number]) for role, number in after)


def _edit_projection(
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


def _mix_projection(
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
    for tensor, (before, result) in shapes.items():
        if tensor == "bias" and not old.bias:
            continue
        name = f"{old.path}.{tensor}"
        yield TensorEdit(
            operation=operation,
            transform="mix_heads",
            arguments={
                "axis": 1 if old.transposed and tensor == "weight" else 0,
                "unit": old.unit,
                "parts": _to_lists(parts),
                "uses": [list(use) for use in uses],
                "fill": "source",
            },
            sources=(TensorSpec(name, before),),
            results=(TensorSpec(name, result),),
            resolved=tuple(maps),
        )


def _replace_output(
    operation: str, output: Projection, axis: int, query: Parts, specs: Mapping[str, TensorSpec]
) -> Iterator[TensorEdit]:
    weight = specs["output"]
    before = (output.out_features, output.in_features)
    yield TensorEdit(
        operation=operation,
        transform="put_tensor",
        arguments={"axis": axis, "unit": output.unit, "parts": _to_lists(query), "fill": "zero"},
        sources=(TensorSpec(f"{output.path}.weight", before[::-1] if axis == 0 else before),),
        results=(TensorSpec(f"{output.path}.weight", weight.shape),),
        resolved=(weight,),
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
    if parts == keep_all_heads(heads):
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
            "parts": _to_lists(parts),
            "heads": heads,
            "fill": fill,
            **merging.make_arguments(name),
        },
        sources=(TensorSpec(name, shapes[0]),),
        results=(TensorSpec(name, shapes[1]),),
    )


def _to_lists(parts: Parts) -> list[list[int]]:
    return [list(part) for part in parts]
