"""`gqa`: fewer KV heads, each shared by a group of query heads (arXiv:2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from omegaconf import MISSING

from surgery.anatomy import Norm, Projection, Site
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.plan.edits import SiteChange, TensorEdit, TensorSpec
from surgery.plan.operation import Operation, PlanContext


class Merge(Enum):
    """How the KV heads of a group become one (Ainslie et al. 2023, section 3.3)."""

    mean = "mean"
    first = "first"
    random = "random"


@operation("gqa")
@dataclass
class GQA(Operation):
    """Options of `attention.gqa`.

    Attributes:
        kv_heads: KV heads per site afterwards; a divisor of what it has. 1 is MQA.
        merge: mean of the group's heads, the first of them, or a fresh random head.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    kv_heads: int = MISSING
    merge: Merge = Merge.mean
    layers: list[int] | None = None

    def changes(self, sites: Sequence[Site], context: PlanContext) -> list[SiteChange]:
        chosen = self._chosen(sites)
        for site in chosen:
            self._check(site)
        return [self._change(site, context) for site in chosen if site.kv_heads != self.kv_heads]

    def _chosen(self, sites: Sequence[Site]) -> list[Site]:
        if self.layers is None:
            return list(sites)
        if not self.layers:
            raise ConfigError(
                self.key("layers"), "names no layer", given=self.layers, valid="null for all"
            )
        for layer in self.layers:
            if not 0 <= layer < len(sites):
                raise ConfigError(
                    self.key("layers"), "there is no such layer", given=layer,
                    valid=f"0 to {len(sites) - 1}",
                )  # fmt: skip
        return [sites[layer] for layer in sorted(set(self.layers))]

    def _check(self, site: Site) -> None:
        key = self.key("kv_heads")
        divisors = [n for n in range(1, site.kv_heads + 1) if site.kv_heads % n == 0]
        if self.kv_heads > site.kv_heads:
            raise ConfigError(
                key, f"more than the {site.kv_heads} KV heads of {site.path}",
                given=self.kv_heads, valid=divisors,
            )  # fmt: skip
        if self.kv_heads not in divisors:
            raise ConfigError(
                key, f"does not divide the {site.kv_heads} KV heads of {site.path}",
                given=self.kv_heads, valid=divisors,
            )  # fmt: skip
        if not site.groupable and self.kv_heads != site.kv_heads:
            raise ConfigError(
                "attention.gqa",
                f"the forward of {site.path} cannot share KV heads between query heads",
            )

    def _change(self, site: Site, context: PlanContext) -> SiteChange:
        edits = []
        for projection in (site.key, site.value):
            edits.append(self._edit(site, projection, "weight", context))
            if projection.bias:
                edits.append(self._edit(site, projection, "bias", context))
        k_norm = site.k_norm
        if k_norm is not None and k_norm.size != site.head_dim:
            for tensor in k_norm.tensors:
                edits.append(self._norm_edit(site, k_norm, tensor, context))
            k_norm = replace(k_norm, size=self.kv_heads * site.head_dim)
        width = self.kv_heads * site.head_dim
        after = replace(
            site,
            kv_heads=self.kv_heads,
            key=replace(site.key, out_features=width),
            value=replace(site.value, out_features=width),
            k_norm=k_norm,
        )
        return SiteChange(before=site, after=after, edits=tuple(edits))

    def _edit(
        self, site: Site, projection: Projection, tensor: str, context: PlanContext
    ) -> TensorEdit:
        rest = (projection.in_features,) if tensor == "weight" else ()
        return self._pool(site, f"{projection.path}.{tensor}", rest, self.merge, context)

    def _norm_edit(self, site: Site, norm: Norm, tensor: str, context: PlanContext) -> TensorEdit:
        # A gain is nothing to draw at random.
        merge = Merge.mean if self.merge is Merge.random else self.merge
        return self._pool(site, f"{norm.path}.{tensor}", (), merge, context)

    def _pool(
        self, site: Site, name: str, rest: tuple[int, ...], merge: Merge, context: PlanContext
    ) -> TensorEdit:
        arguments: dict[str, object] = {
            "heads": site.kv_heads,
            "groups": self.kv_heads,
            "merge": merge.value,
        }
        if merge is Merge.random:
            arguments |= {"seed": f"{context.seed}:{name}", "std": context.initializer_range}
        return TensorEdit(
            operation=self.name,
            transform="pool_heads",
            arguments=arguments,
            sources=(TensorSpec(name, (site.kv_heads * site.head_dim, *rest)),),
            results=(TensorSpec(name, (self.kv_heads * site.head_dim, *rest)),),
        )
