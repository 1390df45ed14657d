"""`attention_dropout`: how much of its attention a model drops in training."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from surgery.config.options import Range, option
from surgery.errors import ConfigError
from surgery.models.dropout import (
    DROPS_NOTHING,
    find_dropout_attributes,
    find_governing_keys,
    reads_config,
)
from surgery.plan.draft import Draft
from surgery.plan.layers import LAYERS_HELP, select_sites
from surgery.plan.operation import Operation


@dataclass
class AttentionDropout(Operation):
    """Options of `attention.attention_dropout`.

    Attributes:
        p: share of the attention probabilities that is set to zero in training; 0 drops nothing.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "attention_dropout"

    p: float = option(
        MISSING, "share that is set to zero; 0 drops nothing", range=Range(0, 1, high_open=True)
    )
    layers: list[int] | None = option(None, LAYERS_HELP)

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        held = {site.path: find_dropout_attributes(draft.model, site) for site in sites}
        for site in sites:
            if not held[site.path]:
                raise ConfigError(
                    f"attention.{self.name}",
                    f"{site.path} takes no attention dropout",
                    given=type(draft.model.get_submodule(site.path)).__name__,
                )
        backend = draft.implementation or str(draft.model.config._attn_implementation)
        if self.p and backend in DROPS_NOTHING:
            raise ConfigError(
                self.get_key("p"),
                f"the attention backend {backend} has no dropout",
                given=self.p,
                valid="0, or the backend sdpa",
            )
        keys = find_governing_keys(draft, draft.sites) if self.layers is None else []
        for key in keys:
            draft.set_config(key, self.p)
        for site in sites:
            draft.set_cell(site.path, "dropout", f"{self.p:g}")
            if not keys and reads_config(draft.model, draft.model.get_submodule(site.path)):
                raise ConfigError(
                    self.get_key("layers"),
                    f"{site.path} reads its dropout from the config all blocks share",
                    given=self.layers,
                    valid="null for all",
                )
            for path, name in held[site.path]:
                # Else the config says it; but a layer may hold another value than its config does.
                if draft.get_value(path, name) != self.p:
                    draft.set_attribute(path, name, self.p)
