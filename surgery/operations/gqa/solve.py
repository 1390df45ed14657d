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
from surgery.operations.gqa.aligned import align_keys, align_values, compute_renorm_factor
from surgery.operations.gqa.keys import SharedKeys, compute_group_loss, share_keys
from surgery.operations.gqa.moments import SiteMoments
from surgery.operations.gqa.subspace import compute_least_loss
from surgery.operations.gqa.values import share_values
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


def order_heads(site: Site, groups: Partition) -> Parts:
    """List query heads in the order in which `groups` of KV heads lie side by side."""
    size = site.group_size
    return tuple(
        (head,)
        for group in groups
        for member in group
        for head in range(member * size, (member + 1) * size)
    )


def group_similar_heads(
    model: PreTrainedModel, site: Site, moments: SiteMoments, count: int
) -> Partition:
    """Group the KV heads that lose least: losses of keys and values of every pair, as shares."""
    heads, keys = site.kv_heads, moments.get_key_moments()
    outputs, covariance = get_output_columns(model, site), moments.get_value_moments()
    width = site.value.unit
    # What reads a head's values, as one square root of Σ O^T O.
    half = [
        torch.linalg.qr(torch.cat([outputs[h] for h in _list_readers(site, member)]), mode="r").R
        for member in range(heads)
    ]
    blocks = covariance.view(heads, width, heads, width)
    read = sum(float(((half[m] @ blocks[m, :, m]) * half[m]).sum()) for m in range(heads))
    total = keys.compute_total()
    cost = torch.zeros(heads, heads, dtype=torch.float64)
    for a, b in combinations(range(heads), 2):
        pair = blocks[[a, b]][:, :, [a, b]].reshape(2 * width, 2 * width)
        lost = compute_least_loss(torch.block_diag(half[a], half[b]), pair, width)
        share = compute_group_loss(keys, (a, b)) / max(total, 1e-30) + lost / max(read, 1e-30)
        cost[a, b] = cost[b, a] = share
    return partition(cost, count)


def merge_optimal(
    model: PreTrainedModel, site: Site, moments: SiteMoments, groups: Partition
) -> SiteMerge:
    """Merge in closed form: `share_keys` and `share_values` for every group."""
    keys = moments.get_key_moments()
    shared = [share_keys(keys, group) for group in groups]
    outputs, attended = get_output_columns(model, site), moments.get_attended_moments()
    values, columns, lost = [], [], []
    for group in groups:
        readers = [head for member in group for head in _list_readers(site, member)]
        member_of = {h: place for place, m in enumerate(group) for h in _list_readers(site, m)}
        found = share_values(
            {h: attended[h] for h in readers},
            {h: outputs[h] for h in readers},
            member_of,
            len(group),
        )
        values.append(found.value)
        columns += [found.output[head] for head in readers]
        lost.append(found.loss)
    losses = {
        "keys": sum(one.loss for one in shared) / max(keys.compute_total(), 1e-30),
        "values": sum(lost) / len(lost),
    }
    return _assemble_merge(site, moments, groups, shared, values, columns, losses)


def merge_aligned(
    model: PreTrainedModel, site: Site, moments: SiteMoments, groups: Partition, *, renorm: bool
) -> SiteMerge:
    """Turn heads towards each other, then average; with `renorm`, restore their size."""
    keys, covariance = moments.get_key_moments(), moments.get_value_moments()
    outputs = get_output_columns(model, site)
    rows = {role: get_weight_rows(model, site, role) for role in ("key", "value")}
    width = site.value.unit
    shared, values, columns = [], [], []
    for group in groups:
        key = align_keys(keys, group)
        inside = torch.cat([torch.arange(m * width, (m + 1) * width) for m in group])
        value = align_values(covariance[inside][:, inside], len(group))
        made = value.value
        if renorm:
            scales = moments.key_scales
            assert scales is not None
            source = [rows["key"][m] for m in group]
            pooled = scales.fold_norm(key.key, group) @ torch.cat(source)
            key = SharedKeys(key.key * compute_renorm_factor(pooled, source), key.query, key.loss)
            source = [rows["value"][m] for m in group]
            made = made * compute_renorm_factor(made @ torch.cat(source), source)
        shared.append(key)
        values.append(made)
        for place, member in enumerate(group):
            columns += [
                outputs[head] @ value.turns[place].mT for head in _list_readers(site, member)
            ]
    return _assemble_merge(site, moments, groups, shared, values, columns, {})


def _list_readers(site: Site, member: int) -> range:
    return range(member * site.group_size, (member + 1) * site.group_size)


def _assemble_merge(
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
        query_scales.fold_norm(one.query[place], [head])
        for one, group in zip(shared, groups, strict=True)
        for place, member in enumerate(group)
        for head in _list_readers(site, member)
    ]
    return SiteMerge(
        query=order_heads(site, groups),
        kv=groups,
        tensors={
            "query": torch.stack(queries),
            "key": torch.stack(
                [key_scales.fold_norm(s.key, g) for s, g in zip(shared, groups, strict=True)]
            ),
            "value": torch.stack(list(values)),
            "output": torch.cat(list(columns), dim=1),
        },
        losses=dict(losses),
    )
