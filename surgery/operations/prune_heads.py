"""`prune_heads`: heads physically removed, those named or those with the lowest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from surgery.anatomy import Site
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.layers import chosen
from surgery.operations.scores import lowest, read_scores
from surgery.plan.head_edits import Merging, kept, regroup
from surgery.plan.operation import Draft, Operation, Step

_SHAPE = "a list of heads for every layer, or {layer: [heads]}"


class Scope(Enum):
    """What an amount is counted over."""

    layer = "layer"
    all = "all"


class Cut(Enum):
    """What goes at once where query heads share KV heads."""

    groups = "groups"
    queries = "queries"


@operation("prune_heads")
@dataclass
class PruneHeads(Operation):
    """Options of `attention.prune_heads`.

    Attributes:
        heads: query heads to remove: one list for every chosen layer, or layer → list.
        amount: instead, the share of heads to remove, lowest scores first.
        count: instead, how many heads to remove: of each layer, or of all by `scope`.
        scores: a JSON file with a score per layer and head, for `amount` and `count`.
        scope: whether each layer loses as many, or the lowest of all layers go.
        cut: where query heads share KV heads: whole groups, KV head included, or as many query
            heads of each group. Explicit heads may be both.
        layers: sites to change, by number from 0; ``None`` for all.
        remove_attention: whether a site may lose all its heads, and with them its attention.
    """

    heads: Any = None
    amount: float | None = None
    count: int | None = None
    scores: str | None = None
    scope: Scope = Scope.layer
    cut: Cut = Cut.groups
    layers: list[int] | None = None
    remove_attention: bool = False

    def plan(self, draft: Draft) -> None:
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        self._check_options()
        removed = self._explicit(sites) if self.heads is not None else self._scored(sites, draft)
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
            draft.change([self._change(site, going)])
        if emptied:
            draft.steps.append(
                Step(self.name, "remove_attention", {"sites": emptied}, recorded=True)
            )
            draft.removed |= set(emptied)

    def _check_options(self) -> None:
        ways = {"heads": self.heads, "amount": self.amount, "count": self.count}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(
                "attention.prune_heads", "needs exactly one of heads, amount and count",
                given=", ".join(given) or "none of them",
            )  # fmt: skip
        if self.heads is None and self.scores is None:
            raise ConfigError(
                self.key("scores"), f"`{given[0]}` needs a score for every head",
                valid="a JSON file: {\"scores\": [[one number per head] per layer]}",
            )  # fmt: skip
        if self.heads is not None and self.scores is not None:
            raise ConfigError(self.key("scores"), "are of no use where `heads` says which",
                              given=self.scores, valid="null")  # fmt: skip
        if self.heads is not None and self.scope is not Scope.layer:
            raise ConfigError(self.key("scope"), "is of no use where `heads` says which",
                              given=self.scope.value, valid=Scope.layer.value)  # fmt: skip
        if self.heads is not None and self.cut is not Cut.groups:
            raise ConfigError(self.key("cut"), "is of no use where `heads` says which",
                              given=self.cut.value, valid=Cut.groups.value)  # fmt: skip
        if self.amount is not None and not 0 <= self.amount <= 1:
            raise ConfigError(self.key("amount"), "must lie between 0 and 1", given=self.amount)
        if self.count is not None and self.count < 0:
            raise ConfigError(self.key("count"), "must not be negative", given=self.count)

    def _explicit(self, sites: Sequence[Site]) -> dict[int, list[int]]:
        key = self.key("heads")
        by_layer: dict[int, Any] = {}
        if isinstance(self.heads, Mapping):
            known = {site.layer for site in sites}
            for layer, heads in self.heads.items():
                number = int(layer) if str(layer).isdigit() else layer
                if number not in known:
                    raise ConfigError(key, "there is no such layer", given=layer,
                                      valid=sorted(known))  # fmt: skip
                by_layer[number] = heads
        else:
            by_layer = {site.layer: self.heads for site in sites}
        for site in sites:
            heads = by_layer.get(site.layer, [])
            if not isinstance(heads, (list, tuple)) or not all(type(h) is int for h in heads):
                raise ConfigError(key, "is no list of heads", given=repr(heads), valid=_SHAPE)
            for head in heads:
                if not 0 <= head < site.q_heads:
                    raise ConfigError(
                        key, f"{site.path} has no such head", given=head,
                        valid=f"0 to {site.q_heads - 1}",
                    )  # fmt: skip
        return {layer: sorted(set(heads)) for layer, heads in by_layer.items()}

    def _scored(self, sites: Sequence[Site], draft: Draft) -> dict[int, list[int]]:
        assert self.scores is not None
        table = read_scores(self.scores, draft.sites, self.key("scores"))
        return lowest(
            sites, table, amount=self.amount, count=self.count,
            together=self.scope is Scope.all, by_group=self.cut is Cut.groups,
            empty=self.remove_attention, key=self.key("count" if self.count else "amount"),
        )  # fmt: skip

    def _check_emptied(self, site: Site) -> None:
        if not self.remove_attention:
            raise ConfigError(
                self.key("heads"), f"all {site.q_heads} heads of {site.path} would go",
                given=f"{site.q_heads} heads",
                valid=f"at most {site.q_heads - 1}, or {self.key('remove_attention')}=true",
            )  # fmt: skip
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

    def _change(self, site: Site, going: Sequence[int]) -> Any:
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
        return regroup(site, self.name, kept(left), kept(groups), Merging())
