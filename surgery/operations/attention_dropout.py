"""`attention_dropout`: how much of its attention a model drops in training."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from surgery.architecture.dropouts import governing_keys, holders, reads_config, refuses_dropout
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.layers import chosen
from surgery.plan.operation import Draft, Operation, Step


@operation("attention_dropout")
@dataclass
class AttentionDropout(Operation):
    """Options of `attention.attention_dropout`.

    Attributes:
        p: share of the attention probabilities that is set to zero in training; 0 drops nothing.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    p: float = MISSING
    layers: list[int] | None = None

    def plan(self, draft: Draft) -> None:
        if not 0 <= self.p < 1:
            raise ConfigError(
                self.key("p"), "is no share", given=self.p, valid="0 up to, not including, 1"
            )
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        for site in sites:
            if not holders(draft.skeleton.get_submodule(site.path)):
                raise ConfigError(
                    f"attention.{self.name}",
                    f"{site.path} takes no attention dropout",
                    given=type(draft.skeleton.get_submodule(site.path)).__name__,
                )
        backend = refuses_dropout(draft) if self.p else ""
        if backend:
            raise ConfigError(
                self.key("p"),
                f"the attention backend {backend} has no dropout",
                given=self.p,
                valid="0, or attention.backend.implementation=sdpa",
            )
        keys = governing_keys(draft.skeleton, draft.sites) if self.layers is None else []
        if not keys:
            for site in sites:
                if reads_config(draft.skeleton, draft.skeleton.get_submodule(site.path)):
                    raise ConfigError(
                        self.key("layers"),
                        f"{site.path} reads its dropout from the config all blocks share",
                        given=self.layers,
                        valid="null for all",
                    )
        for key in keys:
            draft.set_config(key, self.p)
        arguments = {"p": self.p, "sites": [site.path for site in sites]}
        draft.steps.append(Step(self.name, self.name, arguments, recorded=not keys))
