"""`temperature`: attention that is sharper, or flatter, than the model learnt it."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from surgery import ConfigError, Draft, Operation, Range, option, select_sites


@dataclass
class Temperature(Operation):
    """Options of `attention.temperature`.

    Attributes:
        value: what the logits are divided by before the softmax.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "temperature"

    value: float = option(
        MISSING, "logits are divided by it; below 1 is sharper", range=Range(0, low_open=True)
    )
    layers: list[int] | None = option(None, "layer numbers from 0; null for all")

    def plan(self, draft: Draft) -> None:
        for site in select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed):
            scaling = draft.get_value(site.path, "scaling")
            if not isinstance(scaling, float):
                raise ConfigError(
                    f"attention.{self.name}",
                    f"{site.path} does not say what it scales its logits by",
                    valid="a model whose attention has the attribute `scaling`",
                )
            draft.set_attribute(site.path, "scaling", scaling / self.value)
            draft.set_cell(site.path, "temperature", f"{self.value:g}")
