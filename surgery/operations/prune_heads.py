"""`prune_heads`: heads physically removed, those named or those with the lowest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from surgery.anatomy import Site
from surgery.errors import ConfigError
from surgery.importance.table import GROUPS, HEADS
from surgery.operations.base import operation
from surgery.operations.choice import Wanted, choose
from surgery.operations.head_lists import named_heads
from surgery.operations.layers import chosen
from surgery.operations.prune_options import check_options
from surgery.operations.scores import HeadScores, read_scores
from surgery.plan.head_edits import Merging, Rewrite, kept, regroup, rewrite_specs
from surgery.plan.operation import Draft, Operation, Step

# What an amount is counted over. (`global` is a keyword, so no class body can say it.)
Scope = Enum("Scope", {"layer": "layer", "global": "global"})


class Cut(Enum):
    """What goes at once where query heads share KV heads."""

    groups = "groups"
    queries = "queries"


class Schedule(Enum):
    """When heads go: before training, in rounds of it, or by gates that close during it."""

    one_shot = "one_shot"
    iterative = "iterative"
    gradual = "gradual"


@operation("prune_heads")
@dataclass
class PruneHeads(Operation):
    """Options of `attention.prune_heads`.

    Attributes:
        heads: query heads to remove: one list for every chosen layer, or layer → list.
        amount: instead, the share of heads to remove, lowest scores first.
        count: instead, how many heads to remove: of each layer, or of all by `scope`.
        scores: a file with a score per layer and head, for `amount` and `count`.
        estimator: instead, who scores them when the plan is calibrated; see
            `surgery.importance.table.ESTIMATORS`.
        scope: whether each layer loses as many, or the lowest of all layers go.
        uniform: whether every layer ends with as many heads.
        protect: query heads that stay, in the shapes of `heads`.
        cut: where query heads share KV heads: whole groups, KV head included, or as many query
            heads of each group. Explicit heads may be both.
        layers: sites to change, by number from 0; ``None`` for all.
        remove_attention: whether a site may lose all its heads, and with them its attention.
        refit: whether the output projection of each changed site is solved anew, so that the heads
            left make up for those that went; calibrated.
        schedule: see `Schedule`.
        rounds: of ``iterative``.
        until: of ``iterative`` and ``gradual``: share of the training steps by which the heads
            are gone.
    """

    heads: Any = None
    amount: float | None = None
    count: int | None = None
    scores: str | None = None
    estimator: str | None = None
    scope: Scope = Scope.layer
    uniform: bool = False
    protect: Any = None
    cut: Cut = Cut.groups
    layers: list[int] | None = None
    remove_attention: bool = False
    refit: bool = False
    schedule: Schedule = Schedule.one_shot
    rounds: int = 4
    until: float = 0.5

    @property
    def together(self) -> bool:
        """Whether the amount is counted over all layers."""
        return self.scope is Scope["global"]

    @property
    def unit(self) -> str:
        """What is scored: ``groups`` or ``heads``."""
        return GROUPS if self.cut is Cut.groups else HEADS

    @property
    def deferred(self) -> bool:
        """Whether training decides which heads go, and when; see `decided`."""
        return self.schedule is not Schedule.one_shot

    @property
    def calibrated(self) -> bool:
        return not self.deferred and (self.estimator is not None or self.refit)

    def decided(self, heads: Mapping[int, Sequence[int]]) -> PruneHeads:
        """The same with these heads to remove, layer → query heads, and nothing left open."""
        given = {layer: list(numbers) for layer, numbers in heads.items()}
        return PruneHeads(heads=given, layers=self.layers, remove_attention=self.remove_attention)

    def choose(
        self, sites: Sequence[Site], scores: HeadScores | None = None, *, layers: int | None = None
    ) -> dict[int, list[int]]:
        """The heads to remove of the chosen `sites`: layer → query heads, ascending.

        Args:
            scores: of these sites, for an estimator; a file's are read here.
            layers: how many layers the model has, which the file must be for; ``None``: not known.

        Raises:
            ConfigError: these heads cannot go.
        """
        if self.heads is not None:
            return named_heads(self.heads, sites, self.key("heads"))
        if self.scores is not None:
            scores = read_scores(
                self.scores, sites, self.key("scores"), unit=self.unit, layers=layers
            )
        wanted = Wanted(
            self.amount,
            self.count,
            together=self.together,
            uniform=self.uniform,
            by_group=self.cut is Cut.groups,
            empty=self.remove_attention,
        )
        protected = named_heads(self.protect or [], sites, self.key("protect"))
        return choose(sites, scores or _even(sites), wanted, protected)

    def plan(self, draft: Draft) -> None:
        check_options(self)
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        self._check_cut(sites)
        self._check_native(draft, sites)
        removed = self._removed(draft, sites)
        self._open(draft, removed)
        emptied = []
        for site in sites:
            going = removed.get(site.layer, [])
            if not going:
                continue
            if len(going) == site.q_heads:
                self._check_emptied(site)
                emptied.append(site.path)
                continue
            self._check_norm(site)
            self._check_blocks(site, going)
            draft.change([self._change(draft, site, going)])
        self._note(draft, sites, removed)
        if emptied:
            draft.steps.append(
                Step(self.name, "remove_attention", {"sites": emptied}, recorded=True)
            )
            draft.removed |= set(emptied)

    def _removed(self, draft: Draft, sites: Sequence[Site]) -> dict[int, list[int]]:
        if draft.resolution is None:
            return self.choose(sites, layers=len(draft.sites))
        removed = {}
        for site in sites:
            found = draft.resolution.get(site.path)
            left = {head for part in found.query for head in part} if found is not None else None
            if left is not None:
                removed[site.layer] = [h for h in range(site.q_heads) if h not in left]
        return removed

    def _open(self, draft: Draft, removed: Mapping[int, Sequence[int]]) -> None:
        if draft.resolution is not None or not any(removed.values()):
            return
        if self.deferred:
            draft.open_decisions.append(
                f"prune_heads: training decides which heads go ({self.schedule.value}; assumed "
                "here: the first of each layer)"
            )
            return
        if self.estimator is not None:
            draft.open_decisions.append(
                f"prune_heads: which heads go, by {self.estimator} (assumed here: the first of "
                "each layer)"
            )
        if self.refit:
            draft.open_decisions.append("prune_heads: the output projections that are refitted")

    def _note(
        self, draft: Draft, sites: Sequence[Site], removed: Mapping[int, Sequence[int]]
    ) -> None:
        if self.heads is not None:
            return
        total, gone = sum(site.q_heads for site in sites), sum(map(len, removed.values()))
        if self.amount is not None:
            asked, said = self.amount * total, f"amount={self.amount:g}"
        else:
            asked = (self.count or 0) * (1 if self.together else len(sites))
            said = f"count={self.count}"
        if abs(asked - gone) > 1e-6:
            draft.notes.append(
                f"prune_heads: {gone} of {total} heads go ({gone / total:.1%}) for {said}"
            )
        if self.uniform and sites:
            left = sites[0].q_heads - len(removed.get(sites[0].layer, []))
            if self.together:
                draft.notes.append(
                    f"prune_heads: uniform, so every layer keeps {left} heads and loses its own "
                    "lowest; scope=global only counts the amount over all"
                )
            elif len({site.q_heads for site in sites}) > 1:
                draft.notes.append(
                    f"prune_heads: uniform, so every layer keeps {left} heads, as many as the one "
                    "that keeps fewest"
                )

    def _check_cut(self, sites: Sequence[Site]) -> None:
        if self.cut is Cut.queries and all(site.group_size == 1 for site in sites):
            raise ConfigError(
                self.key("cut"),
                "every KV head has one query head, which cannot go without it",
                given=self.cut.value,
                valid=Cut.groups.value,
            )

    def _check_native(self, draft: Draft, sites: Sequence[Site]) -> None:
        open_counts = self.estimator is not None and self.together and not self.uniform
        if draft.context.native and open_counts and len(sites) > 1:
            raise ConfigError(
                self.key("scope"),
                "may leave layers with different numbers of heads, which no "
                "config of the architecture can say",
                given=self.scope.value,
                valid="layer, uniform: true, or another export.format",
            )

    def _check_emptied(self, site: Site) -> None:
        if not self.remove_attention:
            raise ConfigError(
                self.key("heads"),
                f"all {site.q_heads} heads of {site.path} would go",
                given=f"{site.q_heads} heads",
                valid=f"at most {site.q_heads - 1}, or {self.key('remove_attention')}=true",
            )
        if site.block != site.path:
            raise ConfigError(
                self.key("remove_attention"),
                f"{site.path} has no output projection of its own, so it cannot be removed",
                valid=f"at most {site.q_heads - 1} of its heads removed",
            )

    def _check_norm(self, site: Site) -> None:
        norm = site.q_norm or site.k_norm
        if norm is not None and norm.size != site.head_dim:
            raise ConfigError(
                "attention.prune_heads",
                f"{norm.path} is taken over all heads together: removing one changes the others",
                given=f"a norm of {norm.size} weights for heads of {site.head_dim}",
                valid="a model with a norm per head, or none",
            )

    def _check_blocks(self, site: Site, going: Sequence[int]) -> None:
        packing = site.packing
        if packing is None or packing.grouped or (site.q_heads - len(going)) % packing.blocks == 0:
            return
        raise ConfigError(
            self.key("heads"),
            f"{site.path} lays out its heads in {packing.blocks} equal blocks",
            given=f"{site.q_heads - len(going)} heads left",
            valid=f"a multiple of {packing.blocks}",
        )

    def _change(self, draft: Draft, site: Site, going: Sequence[int]) -> Any:
        size = site.group_size
        left = [head for head in range(site.q_heads) if head not in set(going)]
        groups = sorted({head // size for head in left})
        members = {group: sum(head // size == group for head in left) for group in groups}
        if len(set(members.values())) > 1:
            raise ConfigError(
                self.key("heads"),
                f"leaves the KV heads of {site.path} with unequal shares of query heads",
                given=list(going),
                valid=f"whole groups of {size} neighbours, or as many heads of each group",
            )
        query, kv = kept(left), kept(groups)
        rewrite = None
        if self.refit and not self.deferred:
            prefix = f"{draft.number}.{site.path}"
            rewrite = Rewrite(prefix, site.output.bias, output_only=True)
            found = (draft.resolution or {}).get(site.path)
            if found is not None:
                specs = rewrite_specs(site, rewrite, query, kv)
                draft.tensors |= {specs[role].name: t for role, t in found.tensors.items()}
        return regroup(site, self.name, query, kv, Merging(), rewrite)


def _even(sites: Sequence[Site]) -> HeadScores:
    """Under which every layer loses as many, from its first on: what a plan assumes meanwhile."""
    return HeadScores(
        {site.layer: [head % site.group_size for head in range(site.q_heads)] for site in sites},
        {site.layer: list(range(site.kv_heads)) for site in sites},
    )
