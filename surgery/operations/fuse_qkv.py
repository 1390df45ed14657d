"""`fuse_qkv`: query, key and value projections as one matrix product."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.anatomy import Site
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.layers import chosen
from surgery.plan.operation import Draft, Operation, Step


@operation("fuse_qkv")
@dataclass
class FuseQKV(Operation):
    """Options of `attention.fuse_qkv`.

    The fusing is for training and running; an export has the separate projections again, to the
    bit, unless the architecture itself has them in one.

    Attributes:
        keep: export them fused. Only for an architecture that has them so, such as Phi-3.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    keep: bool = False
    layers: list[int] | None = None

    def plan(self, draft: Draft) -> None:
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        kind = type(draft.skeleton).__name__
        packed = [site for site in sites if _is_packed(site)]
        separate = [site for site in sites if not _is_packed(site)]
        if self.layers is None:
            crossing = [site for site in separate if site.cross]
            separate = [site for site in separate if not site.cross]
            if crossing:
                draft.notes.append(
                    f"fuse_qkv: {len(crossing)} cross-attention blocks keep their projections "
                    "apart, since their keys come from elsewhere"
                )
        if self.keep and separate:
            raise ConfigError(
                self.key("keep"),
                f"a {kind} keeps its projections apart",
                given=True,
                valid="false, or first attention.rehouse.into=phi3, which has them fused",
            )
        for site in separate:
            self._check(site)
        if packed:
            layers = ", ".join(str(site.layer) for site in packed)
            draft.notes.append(f"fuse_qkv: layers {layers} of this {kind} are fused already")
        if separate:
            draft.steps.append(
                Step(self.name, "fuse_qkv", {"sites": [_places(site) for site in separate]})
            )

    def _check(self, site: Site) -> None:
        key, parts = f"attention.{self.name}", (site.query, site.key, site.value)
        if site.cross or len({part.in_features for part in parts}) > 1:
            raise ConfigError(
                key,
                f"the keys of {site.path} come from elsewhere than its queries",
                given=f"layer {site.layer}",
                valid="layers null, which leaves it as it is",
            )
        if any(part.transposed for part in parts):
            raise ConfigError(key, f"the projections of {site.path} are no Linears")
        if len({part.bias for part in parts}) > 1:
            raise ConfigError(key, f"only some of the projections of {site.path} have a bias")
        if len({part.path.rpartition(".")[0] for part in parts}) > 1:
            raise ConfigError(key, f"the projections of {site.path} are in different modules")


def _is_packed(site: Site) -> bool:
    return site.query.path == site.key.path


def _places(site: Site) -> dict[str, str]:
    return {
        "path": site.path,
        "query": site.query.path,
        "key": site.key.path,
        "value": site.value.path,
    }
