"""From a site's moments to the tensors of its merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.calibration.grouping import Partition, partition
from surgery.calibration.rows import get_output_columns, get_weight_rows
from surgery.models.sites import Site
from surgery.operations.gqa.aligned import aligned_keys, aligned_values, renormalised
from surgery.operations.gqa.keys import SharedKeys, group_loss, shared_keys
from surgery.operations.gqa.moments import SiteMoments
from surgery.operations.gqa.subspace import least_lost
from surgery.operations.gqa.values import shared_values
from surgery.plan.resolution import Parts


@dataclass(frozen=True)
class SiteMerge:
    """One site's merge, its heads in the order of the result.

    Attributes:
        query, kv: per result head, the source heads that become it.
        tensors: role → map, as `surgery.transforms.head_edits.Rewrite` has them; the output
            projection's weight is [D_model, heads * D] here, whatever the architecture's layout.
        losses: what is lost, as shares.
    """

    query: Parts
    kv: Parts
    tensors: dict[str, torch.Tensor]
    losses: dict[str, Any]


def heads_in_groups(site: Site, groups: Partition) -> Parts:
    """Query heads in the order in which `groups` of KV heads lie side by side."""
    size = site.group_size
    return tuple(
        (head,)
        for group in groups
        for member in group
        for head in range(member * size, (member + 1) * size)
    )


def similar_groups(
    model: PreTrainedModel, site: Site, moments: SiteMoments, count: int
) -> Partition:
    """Groups of KV heads that lose least: keys' and values' losses of every pair, as shares."""
    heads, keys = site.kv_heads, moments.keys()
    outputs, covariance = get_output_columns(model, site), moments.values()
    width = site.value.unit
    # What reads a head's values, as one square root of Σ O^T O.
    half = [
        torch.linalg.qr(torch.cat([outputs[h] for h in _readers(site, member)]), mode="r").R
        for member in range(heads)
    ]
    blocks = covariance.view(heads, width, heads, width)
    read = sum(float(((half[m] @ blocks[m, :, m]) * half[m]).sum()) for m in range(heads))
    total = keys.total()
    cost = torch.zeros(heads, heads, dtype=torch.float64)
    for a, b in combinations(range(heads), 2):
        pair = blocks[[a, b]][:, :, [a, b]].reshape(2 * width, 2 * width)
        lost = least_lost(torch.block_diag(half[a], half[b]), pair, width)
        share = group_loss(keys, (a, b)) / max(total, 1e-30) + lost / max(read, 1e-30)
        cost[a, b] = cost[b, a] = share
    return partition(cost, count)


def optimal(
    model: PreTrainedModel, site: Site, moments: SiteMoments, groups: Partition
) -> SiteMerge:
    """The closed form: `shared_keys` and `shared_values` for every group."""
    keys = moments.keys()
    shared = [shared_keys(keys, group) for group in groups]
    outputs, attended = get_output_columns(model, site), moments.attended()
    values, columns, lost = [], [], []
    for group in groups:
        readers = [head for member in group for head in _readers(site, member)]
        member_of = {h: place for place, m in enumerate(group) for h in _readers(site, m)}
        found = shared_values(
            {h: attended[h] for h in readers},
            {h: outputs[h] for h in readers},
            member_of,
            len(group),
        )
        values.append(found.value)
        columns += [found.output[head] for head in readers]
        lost.append(found.loss)
    losses = {
        "keys": sum(one.loss for one in shared) / max(keys.total(), 1e-30),
        "values": sum(lost) / len(lost),
    }
    return _merge(site, moments, groups, shared, values, columns, losses)


def aligned(
    model: PreTrainedModel, site: Site, moments: SiteMoments, groups: Partition, *, renorm: bool
) -> SiteMerge:
    """Turned towards each other, then averaged; with `renorm`, as large again as they were."""
    keys, covariance = moments.keys(), moments.values()
    outputs = get_output_columns(model, site)
    rows = {role: get_weight_rows(model, site, role) for role in ("key", "value")}
    width = site.value.unit
    shared, values, columns = [], [], []
    for group in groups:
        key = aligned_keys(keys, group)
        inside = torch.cat([torch.arange(m * width, (m + 1) * width) for m in group])
        value = aligned_values(covariance[inside][:, inside], len(group))
        made = value.value
        if renorm:
            scales = moments.key_scales
            assert scales is not None
            source = [rows["key"][m] for m in group]
            pooled = scales.into(key.key, group) @ torch.cat(source)
            key = SharedKeys(key.key * renormalised(pooled, source), key.query, key.loss)
            source = [rows["value"][m] for m in group]
            made = made * renormalised(made @ torch.cat(source), source)
        shared.append(key)
        values.append(made)
        for place, member in enumerate(group):
            columns += [outputs[head] @ value.turns[place].mT for head in _readers(site, member)]
    return _merge(site, moments, groups, shared, values, columns, {})


def _readers(site: Site, member: int) -> range:
    return range(member * site.group_size, (member + 1) * site.group_size)


def _merge(
    site: Site,
    moments: SiteMoments,
    groups: Partition,
    shared: Sequence[SharedKeys],
    values: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    losses: Mapping[str, Any],
) -> SiteMerge:
    key_scales, query_scales = moments.key_scales, moments.query_scales
    assert key_scales is not None
    assert query_scales is not None
    queries = [
        query_scales.into(one.query[place], [head])
        for one, group in zip(shared, groups, strict=True)
        for place, member in enumerate(group)
        for head in _readers(site, member)
    ]
    return SiteMerge(
        query=heads_in_groups(site, groups),
        kv=groups,
        tensors={
            "query": torch.stack(queries),
            "key": torch.stack(
                [key_scales.into(s.key, g) for s, g in zip(shared, groups, strict=True)]
            ),
            "value": torch.stack(list(values)),
            "output": torch.cat(list(columns), dim=1),
        },
        losses=dict(losses),
    )
