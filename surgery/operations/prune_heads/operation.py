"""`prune_heads`: heads physically removed, those named or those with the lowest scores."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.prune_heads.choices import list_cuts, try_cuts
from surgery.operations.prune_heads.cut import name_closed
from surgery.operations.prune_heads.options import ELIMINATION, Cut, PruneOptions
from surgery.operations.prune_heads.removal import check_removal, remove_attention_
from surgery.operations.prune_heads.resolve import resolve_pruning
from surgery.operations.prune_heads.schedule import check_schedule
from surgery.plan.choice import Choice
from surgery.plan.draft import Draft
from surgery.plan.layers import select_sites
from surgery.plan.operation import StepFunction, TrainingDecision
from surgery.plan.plan import Plan
from surgery.plan.resolution import Resolution, make_prefix
from surgery.transforms.head_edits import Merging, Rewrite, keep_heads, make_rewrite_specs, regroup


@dataclass
class PruneHeads(PruneOptions):
    """Heads physically removed, those named or those with the lowest scores.

    Michel et al. 2019 (arXiv:1905.10650). See `PruneOptions` for the options.
    """

    name = "prune_heads"
    steps: ClassVar[Mapping[str, StepFunction]] = {"remove_attention": remove_attention_}
    # Options that may be chosen by, too: `cut`, `protect`.
    searched: ClassVar[Mapping[str, Any]] = {
        "count": 0,
        "estimator": ELIMINATION,
        "remove_attention": True,
    }

    def calibrate(self, case: Any) -> tuple[PruneOptions, Resolution]:
        return resolve_pruning(self, case)

    @property
    def fitted_jointly(self) -> bool:
        return self.refits

    def list_choices(self, site: Site) -> list[Choice]:
        return list_cuts(self, site)

    def try_choices(
        self, site: Site, original: Any, working: Any, options: Any
    ) -> Generator[Choice, None, None]:
        return try_cuts(self, site, original, working, options)

    def join_choices(self, chosen: Mapping[int, Choice]) -> PruneOptions:
        removed = {layer: choice.given for layer, choice in chosen.items()}
        return replace(self.adopt_decision(removed), refit=True)

    def explain_calibration_error(self, path: str, why: str) -> ConfigError:
        return ConfigError(
            self.get_key("refit"), f"{path} cannot be calibrated: {why}", given=True, valid="false"
        )

    def check_run(self, run: Any) -> None:
        if self.deferred:
            check_schedule(self, run)

    def follow_training(
        self,
        sites: Sequence[Site],
        options: Mapping[str, Any],
        task: Any,
        scorer: Any = None,
    ) -> TrainingDecision:
        # Lightning takes seconds to import, and only training needs it.
        from surgery.operations.prune_heads.gating import GatedPruning

        return GatedPruning(self, sites, options, task, scorer)

    def adopt_decision(self, decision: Mapping[int, Sequence[int]]) -> PruneOptions:
        """The same with these heads to remove, layer → query heads, and nothing left open."""
        given = {layer: list(numbers) for layer, numbers in decision.items()}
        return PruneHeads(heads=given, layers=self.layers, remove_attention=self.remove_attention)

    def adopt_decision_on(
        self, sites: Sequence[Site], model: PreTrainedModel, decision: Mapping[int, Sequence[int]]
    ) -> PruneOptions:
        closed = {layer: list(heads) for layer, heads in decision.items()}
        return name_closed(model, sites, self, closed)

    @classmethod
    def verify(cls, model: PreTrainedModel, plan: Plan, probe: Mapping[str, Any] | None) -> None:
        if plan.removed:
            check_removal(model, plan.removed, probe)

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        self._check_cut(sites)
        self._check_native(draft, sites)
        removed = self._choose_removed(draft, sites)
        self._add_open_decisions(draft, removed)
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
            draft.add_changes([self._make_change(draft, site, going)])
        self._add_notes(draft, sites, removed)
        if emptied:
            draft.add_step("remove_attention", {"sites": emptied}, recorded=True)
            draft.removed |= set(emptied)

    def _choose_removed(self, draft: Draft, sites: Sequence[Site]) -> dict[int, list[int]]:
        if draft.resolution is None:
            return self.choose(sites, layers=len(draft.sites))
        removed = {}
        for site in sites:
            found = draft.resolution.get(site.path)
            left = {head for part in found.query for head in part} if found is not None else None
            if left is not None:
                removed[site.layer] = [h for h in range(site.q_heads) if h not in left]
        return removed

    def _add_open_decisions(self, draft: Draft, removed: Mapping[int, Sequence[int]]) -> None:
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
        if self.refits:
            draft.open_decisions.append("prune_heads: the output projections that are refitted")

    def _add_notes(
        self, draft: Draft, sites: Sequence[Site], removed: Mapping[int, Sequence[int]]
    ) -> None:
        if self.heads is not None:
            return
        total, gone = sum(site.q_heads for site in sites), sum(map(len, removed.values()))
        if self.amount is not None:
            wanted, option = self.amount * total, f"amount={self.amount:g}"
        else:
            wanted = (self.count or 0) * (1 if self.together else len(sites))
            option = f"count={self.count}"
        if abs(wanted - gone) > 1e-6:
            draft.notes.append(
                f"prune_heads: {gone} of {total} heads go ({gone / total:.1%}) for {option}"
            )
        whole = [site.layer for site in sites if not removed.get(site.layer)]
        if wanted and whole and not self.together and not self.uniform:
            layers = ", ".join(map(str, whole))
            draft.notes.append(
                f"prune_heads: {option} is less than what goes together in layers {layers}, which "
                "keep all their heads"
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
                self.get_key("cut"),
                "every KV head has one query head, and the two are removed together",
                given=self.cut.value,
                valid=Cut.groups.value,
            )

    def _check_native(self, draft: Draft, sites: Sequence[Site]) -> None:
        open_counts = self.estimator is not None and self.together and not self.uniform
        if draft.context.native and open_counts and len(sites) > 1:
            raise ConfigError(
                self.get_key("scope"),
                "may leave layers with different numbers of heads, which no config of the "
                "architecture can say",
                given=self.scope.value,
                valid="layer, uniform: true, or another export.format",
            )

    def _check_emptied(self, site: Site) -> None:
        if not self.remove_attention:
            raise ConfigError(
                self.get_key("heads"),
                f"all {site.q_heads} heads of {site.path} would go",
                given=f"{site.q_heads} heads",
                valid=f"at most {site.q_heads - 1}, or {self.get_key('remove_attention')}=true",
            )
        if site.block != site.path:
            raise ConfigError(
                self.get_key("remove_attention"),
                f"{site.path} has no output projection of its own, so it cannot be removed",
                valid=f"at most {site.q_heads - 1} of its heads removed",
            )

    def _check_norm(self, site: Site) -> None:
        norm = site.q_norm or site.k_norm
        if norm is not None and norm.size != site.head_dim:
            raise ConfigError(
                f"attention.{self.name}",
                f"{norm.path} is taken over all heads together: removing one changes the others",
                given=f"a norm of {norm.size} weights for heads of {site.head_dim}",
                valid="a model with a norm per head, or none",
            )

    def _check_blocks(self, site: Site, going: Sequence[int]) -> None:
        packing = site.packing
        if packing is None or packing.grouped or (site.q_heads - len(going)) % packing.blocks == 0:
            return
        raise ConfigError(
            self.get_key("heads"),
            f"{site.path} lays out its heads in {packing.blocks} equal blocks",
            given=f"{site.q_heads - len(going)} heads left",
            valid=f"a multiple of {packing.blocks}",
        )

    def _make_change(self, draft: Draft, site: Site, going: Sequence[int]) -> Any:
        size = site.group_size
        left = [head for head in range(site.q_heads) if head not in set(going)]
        groups = sorted({head // size for head in left})
        members = {group: sum(head // size == group for head in left) for group in groups}
        if len(set(members.values())) > 1:
            raise ConfigError(
                self.get_key("heads"),
                f"leaves the KV heads of {site.path} with unequal shares of query heads",
                given=list(going),
                valid=f"whole groups of {size} neighbours, or as many heads of each group",
            )
        query, kv = keep_heads(left), keep_heads(groups)
        rewrite = None
        if self.refits:
            prefix = make_prefix(draft.number, site.path)
            rewrite = Rewrite(prefix, site.output.bias, output_only=True)
            found = (draft.resolution or {}).get(site.path)
            if found is not None:
                specs = make_rewrite_specs(site, rewrite, query, kv)
                draft.tensors |= {specs[role].name: t for role, t in found.tensors.items()}
        return regroup(site, self.name, query, kv, Merging(), rewrite)
