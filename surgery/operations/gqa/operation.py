"""The operation `gqa`: fewer KV heads, each shared by a group of query heads, or repeated ones."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from surgery.calibration.grouping import make_contiguous_groups
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.gqa.choices import list_counts, try_counts
from surgery.operations.gqa.options import GQAOptions, Grouping, Merge
from surgery.operations.gqa.resolve import resolve_gqa
from surgery.plan.choice import Choice
from surgery.plan.draft import Draft
from surgery.plan.layers import select_sites
from surgery.plan.operation import Alternative
from surgery.plan.resolution import Resolution, SiteResolution, make_prefix
from surgery.transforms.head_edits import (
    Merging,
    Rewrite,
    keep_all_heads,
    make_rewrite_specs,
    regroup,
    repeat_heads,
)


@dataclass
class GQA(GQAOptions):
    """Fewer KV heads, each shared by a group of query heads (arXiv:2305.13245).

    Or more of them: each is repeated, and the model computes the same. See `GQAOptions` for the
    options.
    """

    name = "gqa"
    searched: ClassVar[Mapping[str, Any]] = {
        "kv_heads": 1,
        "merge": Merge.optimal.value,
        "grouping": Grouping.similarity.value,
    }

    def calibrate(self, case: Any) -> tuple[GQAOptions, Resolution]:
        return resolve_gqa(self, case)

    @property
    def fitted_jointly(self) -> bool:
        return self.merge is Merge.optimal

    def explain_calibration_error(self, path: str, why: str) -> ConfigError:
        return ConfigError(
            f"attention.{self.name}",
            f"{path} cannot be calibrated: {why}",
            valid="merge mean, first or random with grouping=contiguous, and a number of KV heads",
        )

    def list_choices(self, site: Site) -> list[Choice]:
        return list_counts(self, site)

    def try_choices(
        self, site: Site, original: Any, working: Any, options: Any
    ) -> Generator[Choice, None, None]:
        return try_counts(self, site, original, working, options)

    def join_choices(self, chosen: Mapping[int, Choice]) -> GQAOptions:
        layers = sorted(chosen)
        return replace(self, layers=layers, kv_heads=[chosen[layer].given for layer in layers])

    def find_alternative(self) -> Alternative | None:
        if self.rewrites:
            return None
        best = replace(self, merge=Merge.optimal, grouping=Grouping.similarity)
        return Alternative(
            best,
            "merge=optimal",
            "+recipe=gqa_optimal, or attention.gqa.merge=optimal attention.gqa.grouping=similarity",
            {"merge": best.merge.value, "grouping": best.grouping.value},
        )

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        counts = self.list_counts(sites)
        self._check_groups(sites, counts)
        merged = [(s, n) for s, n in zip(sites, counts, strict=True) if s.kv_heads > n]
        repeated = [s for s, n in zip(sites, counts, strict=True) if s.kv_heads < n]
        for site, _ in merged:
            if self.rewrites or self.grouping is Grouping.similarity or self.groups:
                self._check_gates(site)
                self._check_own_norms(site)
            if self.rewrites:
                self._check_norms(site)
        if draft.resolution is None:
            self._add_open_decisions(draft, merged)
        for site, count in zip(sites, counts, strict=True):
            if count < site.kv_heads:
                groups = make_contiguous_groups(site.kv_heads, count)
                assumed = SiteResolution(keep_all_heads(site.q_heads), groups)
                found = (draft.resolution or {}).get(site.path, assumed)
                draft.add_changes([self._make_change(draft, site, found)])
            elif count > site.kv_heads:
                query, kv = keep_all_heads(site.q_heads), repeat_heads(site.kv_heads, count)
                draft.add_changes([regroup(site, self.name, query, kv, Merging())])
        self._add_repeating_note(draft, repeated)

    def _make_change(self, draft: Draft, site: Site, found: SiteResolution) -> Any:
        context = draft.context
        merging = Merging(
            "mean" if self.rewrites else self.merge.value,
            str(context.seed),
            context.initializer_range,
        )
        rewrite = None
        if self.rewrites:
            bias = site.output.bias and self.merge is Merge.optimal
            if found.tensors:
                bias = "output_bias" in found.tensors
            rewrite = Rewrite(make_prefix(draft.number, site.path), bias)
            specs = make_rewrite_specs(site, rewrite, found.query, found.kv)
            draft.tensors |= {specs[role].name: t for role, t in found.tensors.items()}
        return regroup(site, self.name, found.query, found.kv, merging, rewrite)

    def _add_repeating_note(self, draft: Draft, sites: Sequence[Site]) -> None:
        """Say which options have no effect where KV heads are repeated."""
        given = [
            f"{name}={value.value}"
            for name, value in (("merge", self.merge), ("grouping", self.grouping))
            if value is not getattr(type(self), name)
        ]
        if sites and given:
            layers = ", ".join(str(site.layer) for site in sites)
            draft.notes.append(
                f"{self.name}: {' and '.join(given)}: no effect in layers {layers}, whose KV heads "
                "are repeated"
            )

    def _add_open_decisions(self, draft: Draft, changing: Sequence[tuple[Site, int]]) -> None:
        if self.average is not None and not draft.context.native:
            draft.open_decisions.append(
                f"gqa: KV heads of each layer, {self.average:g} on average (assumed here: the most "
                "that all can have)"
            )
        if not changing:
            return
        if self.grouping is Grouping.similarity:
            draft.open_decisions.append("gqa: which KV heads share one (assumed here: neighbours)")
        if self.groups:
            draft.open_decisions.append("gqa: whether the KV heads of `groups` can change places")
        if self.rewrites:
            draft.open_decisions.append(f"gqa: the coefficients of merge={self.merge.value}")

    def _check_groups(self, sites: Sequence[Site], counts: Sequence[int]) -> None:
        known = {str(site.layer) for site in sites}
        for layer in self.groups or {}:
            if str(layer) not in known:
                raise ConfigError(
                    self.get_key("groups"),
                    "there is no such layer to change",
                    given=layer,
                    valid=sorted(map(int, known)),
                )
        for site, count in zip(sites, counts, strict=True):
            self.get_groups(site, count)

    def _check_norms(self, site: Site) -> None:
        for role, norm in (("query", site.q_norm), ("key", site.k_norm)):
            if norm is not None and norm.size != site.get_projection(role).unit:
                raise ConfigError(
                    self.get_key("merge"),
                    f"{norm.path} is taken over all heads together, so no head can be rewritten "
                    "by itself",
                    given=self.merge.value,
                    valid="mean, first, random",
                )

    def _check_own_norms(self, site: Site) -> None:
        norm = next((norm for norm in (site.q_norm, site.k_norm) if norm and norm.differs), None)
        if norm is not None:
            raise ConfigError(
                self.get_key("merge" if self.rewrites else "groups" if self.groups else "grouping"),
                f"{norm.path} has other weights for each head, which calibration cannot use",
                given=self.merge.value if self.rewrites else self.groups or self.grouping.value,
                valid="mean, first, random" if self.rewrites else "contiguous, no groups",
            )

    def _check_gates(self, site: Site) -> None:
        if site.get_projection("query").unit != site.get_projection("key").unit:
            raise ConfigError(
                self.get_key("merge" if self.rewrites else "groups" if self.groups else "grouping"),
                f"{site.query.path} makes a gate for each query, which calibration cannot use",
                given=self.merge.value if self.rewrites else self.groups or self.grouping.value,
                valid="mean, first, random" if self.rewrites else "contiguous, no groups",
            )
