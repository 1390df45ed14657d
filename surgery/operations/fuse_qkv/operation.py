"""`fuse_qkv`: query, key and value projections as one matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from surgery.config.options import option
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.fuse_qkv.projections import ROLES, fuse_qkv_, unfuse_qkv_
from surgery.plan.draft import Draft, Step
from surgery.plan.layers import LAYERS_HELP, select_sites
from surgery.plan.operation import Operation, StepFunction


@dataclass
class FuseQKV(Operation):
    """Options of `attention.fuse_qkv`.

    The fusing is for training and running; an export has the separate projections again, to the
    bit, unless the architecture itself has them in one.

    Attributes:
        keep: export them fused. Only for an architecture that has them so, such as Phi-3.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "fuse_qkv"
    steps: ClassVar[Mapping[str, StepFunction]] = {"fuse_qkv": fuse_qkv_}
    runs_only = True
    transient = True

    keep: bool = option(False, "true: export them fused, where the architecture has them so (phi3)")
    layers: list[int] | None = option(None, LAYERS_HELP)

    @classmethod
    def undo_(cls, model: PreTrainedModel) -> None:
        unfuse_qkv_(model)

    @classmethod
    def list_joined_tensors(cls, step: Step) -> Sequence[Sequence[str]]:
        return [
            [f"{site[role]}.{tensor}" for role in ROLES]
            for site in step.arguments["sites"]
            for tensor in ("weight", "bias")
        ]

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        kind = type(draft.model).__name__
        packed = [site for site in sites if _is_packed(site)]
        separate = [site for site in sites if not _is_packed(site)]
        if self.layers is None:
            crossing = [site for site in separate if site.cross]
            separate = [site for site in separate if not site.cross]
            if crossing:
                draft.notes.append(
                    f"fuse_qkv: {len(crossing)} cross-attention blocks keep separate "
                    "projections, since their keys come from elsewhere"
                )
        if self.keep and separate:
            raise ConfigError(
                self.get_key("keep"),
                f"a {kind} has separate projections",
                given=True,
                valid="false, or convert it first to an architecture with fused ones (phi3)",
            )
        for site in separate:
            self._check(site)
        if packed:
            layers = ", ".join(str(site.layer) for site in packed)
            draft.notes.append(f"fuse_qkv: layers {layers} of this {kind} are fused already")
        if separate:
            draft.add_step("fuse_qkv", {"sites": [_list_paths(site) for site in separate]})
            for site in separate:
                draft.set_cell(site.path, "projections", "fused")

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
            raise ConfigError(key, f"the projections of {site.path} are not Linears")
        if len({part.bias for part in parts}) > 1:
            raise ConfigError(key, f"only some of the projections of {site.path} have a bias")
        if len({part.path.rpartition(".")[0] for part in parts}) > 1:
            raise ConfigError(key, f"the projections of {site.path} are in different modules")


def _is_packed(site: Site) -> bool:
    return site.query.path == site.key.path


def _list_paths(site: Site) -> dict[str, str]:
    return {
        "path": site.path,
        "query": site.query.path,
        "key": site.key.path,
        "value": site.value.path,
    }
