"""Operations one after the other: what each does to an original that keeps its shapes.

Every entry of `OPERATIONS` draws an operation for a model as the ones before left it, and does the
same to the original in another way. To add one, add an entry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.models.sites import ROLES, Packing, Site, find_sites

TENSORS = ("weight", "bias")


@dataclass
class Original:
    """A model that keeps its shapes, and which of its heads still count.

    A model with fewer KV heads than query heads is written out first, each KV head as often as
    query heads share it, so that more of them can be had later.

    Attributes:
        sites: of the original.
        query: per site, the original query heads that are left, in order.
        kv: per site, the original KV heads that each KV head left stands for, in order; those of
            the query heads that share it hold the same.
    """

    model: PreTrainedModel
    sites: Sequence[Site] = ()
    query: list[list[int]] = field(default_factory=list)
    kv: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shared = find_sites(self.model).sites
        if any(site.group_size > 1 for site in shared):
            self.model = _write_out(self.model, shared)
        self.sites = find_sites(self.model).sites
        self.query = [list(range(site.q_heads)) for site in self.sites]
        self.kv = [
            [
                list(range(head * site.group_size, (head + 1) * site.group_size))
                for head in range(site.kv_heads)
            ]
            for site in shared
        ]

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Nothing is read of query heads that went."""
        with ExitStack() as stack:
            for site, left in zip(self.sites, self.query, strict=True):
                output = self.model.get_submodule(site.output.path)
                hook = output.register_forward_pre_hook(_silencer(site, left))
                stack.callback(hook.remove)
            yield

    def repeat_kv(self, number: int, count: int) -> None:
        """Nothing is rewritten: each KV head stands for those of its own query heads alone."""
        left = self.query[number]
        size = len(left) // count
        self.kv[number] = [left[start : start + size] for start in range(0, len(left), size)]

    def rewrite_kv(self, number: int, groups: Sequence[Sequence[list[int]]], merge: str) -> None:
        """Every original head in a group of them becomes what their representatives merge to."""
        site = self.sites[number]
        for group in groups:
            members = [head for part in group for head in part]
            firsts = [part[0] for part in group]
            for role in ("key", "value"):
                for tensor, rows in _head_rows(self.model, site, role):
                    heads = [tensor[rows(head)] for head in firsts]
                    new = heads[0] if merge == "first" else torch.stack(heads).mean(0)
                    for head in members:
                        tensor[rows(head)] = new


def _write_out(model: PreTrainedModel, shared: Sequence[Site]) -> PreTrainedModel:
    """The same model with a KV head for each query head."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = config.num_attention_heads
    wide = type(model)(config).to(model.dtype).eval()
    state = model.state_dict()
    for old in shared:
        for name in {f"{old.get_projection(role).path}.{t}" for role in ROLES for t in TENSORS}:
            if name not in state:
                continue
            units = state[name].unflatten(0, (-1, old.head_dim))
            repeats = torch.ones(len(units), dtype=torch.long)
            # In one projection keys and values come after the queries.
            first = 0 if old.packing is None else old.q_heads
            if old.packing is not None or not name.startswith(f"{old.query.path}."):
                repeats[first:] = old.group_size
            state[name] = units.repeat_interleave(repeats, dim=0).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def _silencer(site: Site, left: Sequence[int]) -> Callable[..., Any]:
    size = site.output.in_features // site.q_heads

    def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0].clone()
        for head in set(range(site.q_heads)) - set(left):
            states[..., head * size : (head + 1) * size] = 0
        return (states, *args[1:])

    return silence


def _head_rows(
    model: PreTrainedModel, site: Site, role: str
) -> Iterator[tuple[Tensor, Callable[[int], slice]]]:
    """Tensors with rows of every KV head of a role, and where a head's rows are."""
    projection, size = site.get_projection(role), site.head_dim
    module = model.get_submodule(projection.path)

    def rows(head: int) -> slice:
        start = _start(projection.packing, site, role, head) * size
        return slice(start, start + size)

    weight = module.weight.data
    yield (weight.T if projection.transposed else weight), rows
    if projection.bias:
        yield module.bias.data, rows


def _start(packing: Packing | None, site: Site, role: str, head: int) -> int:
    """Where a head begins in its projection's output, in heads."""
    if packing is None:
        return head
    size = site.group_size
    if packing.grouped:  # each KV head after its queries: GPT-NeoX
        return head * (size + 2) + size + (role == "value")
    return site.q_heads + (role == "value") * site.kv_heads + head


@dataclass(frozen=True)
class Entry:
    """An operation of the sequences.

    Attributes:
        draw: options for a model with these sites.
        perform: does the same to the original, given the options and the sites they were drawn
            for, without the code under test.
    """

    draw: Callable[[st.DrawFn, Sequence[Site]], dict[str, Any]]
    perform: Callable[[Original, dict[str, Any], Sequence[Site]], None]


def _draw_gqa(draw: st.DrawFn, sites: Sequence[Site]) -> dict[str, Any]:
    counts = [
        draw(
            st.sampled_from(
                [
                    n
                    for n in range(1, s.q_heads + 1)
                    if not s.kv_heads % n or not (n % s.kv_heads or s.q_heads % n)
                ]
            )
        )
        for s in sites
    ]
    return {"kv_heads": counts, "merge": draw(st.sampled_from(["mean", "first"]))}


def _perform_gqa(original: Original, options: dict[str, Any], sites: Sequence[Site]) -> None:
    for number, (site, count) in enumerate(zip(sites, options["kv_heads"], strict=True)):
        if count > site.kv_heads:
            original.repeat_kv(number, count)
            continue
        size, old = site.kv_heads // count, original.kv[number]
        groups = [old[start : start + size] for start in range(0, len(old), size)]
        if size > 1:
            original.rewrite_kv(number, groups, options["merge"])
        original.kv[number] = [[head for part in group for head in part] for group in groups]


def _draw_prune(draw: st.DrawFn, sites: Sequence[Site]) -> dict[str, Any]:
    heads: dict[int, list[int]] = {}
    for site in sites:
        size = site.group_size
        groups = draw(st.sets(st.integers(0, site.kv_heads - 1), max_size=site.kv_heads - 1))
        going = {head for group in groups for head in range(group * size, (group + 1) * size)}
        within = draw(st.integers(0, size - 1))
        for group in set(range(site.kv_heads)) - groups:
            members = draw(st.permutations(range(size)))[:within]
            going |= {group * size + member for member in members}
        heads[site.layer] = sorted(going)
    return {"heads": heads}


def _perform_prune(original: Original, options: dict[str, Any], sites: Sequence[Site]) -> None:
    for number, site in enumerate(sites):
        going = set(options["heads"][site.layer])
        left = [head for head in range(site.q_heads) if head not in going]
        groups = sorted({head // site.group_size for head in left})
        original.query[number] = [original.query[number][head] for head in left]
        original.kv[number] = [original.kv[number][group] for group in groups]


def _draw_rope(draw: st.DrawFn, sites: Sequence[Site]) -> dict[str, Any]:
    return {"type": "default", "theta": draw(st.sampled_from([100.0, 7e4, 1e6]))}


def _perform_rope(original: Original, options: dict[str, Any], sites: Sequence[Site]) -> None:
    config = original.model.config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": options["theta"]}
    base = original.model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=config)


def _draw_dropout(draw: st.DrawFn, sites: Sequence[Site]) -> dict[str, Any]:
    return {"p": draw(st.sampled_from([0.0, 0.1, 0.5]))}


def _nothing(original: Original, options: dict[str, Any], sites: Sequence[Site]) -> None:
    """What is no change to what the model computes outside of training."""


OPERATIONS: dict[str, Entry] = {
    "gqa": Entry(_draw_gqa, _perform_gqa),
    "prune_heads": Entry(_draw_prune, _perform_prune),
    "rope": Entry(_draw_rope, _perform_rope),
    "attention_dropout": Entry(_draw_dropout, _nothing),
    "fuse_qkv": Entry(lambda draw, sites: {}, _nothing),
}
