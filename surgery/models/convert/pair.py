"""The data classes that describe a conversion between a pair of architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from surgery.models.convert.moves import Move

ConfigValue = Callable[[PreTrainedConfig], Any]


@dataclass(frozen=True)
class Requirement:
    """What the source's config must say for the conversion to be exact.

    Attributes:
        field: the config field.
        met: whether its value allows the conversion.
        why: end of the sentence `<field> is <value>: …`.
    """

    field: str
    met: Callable[[PreTrainedConfig], bool]
    why: str

    def explain(self, config: PreTrainedConfig) -> str:
        """Explain why the requirement is not met; empty if it is met."""
        if self.met(config):
            return ""
        return f"{self.field} is {getattr(config, self.field, None)!r}: {self.why}"


@dataclass(frozen=True)
class Rule:
    """A `Move` for every layer if its names contain ``{layer}``; else one for the whole model.

    Attributes:
        arguments: makes the arguments of the move from the source's config.
        when: whether the source has these tensors.
    """

    transform: str
    sources: tuple[str, ...]
    results: tuple[str, ...]
    arguments: Callable[[PreTrainedConfig], Mapping[str, Any]] = lambda config: {}
    when: Callable[[PreTrainedConfig], bool] = lambda config: True

    def make_moves(self, config: PreTrainedConfig) -> list[Move]:
        if not self.when(config):
            return []
        arguments = self.arguments(config)
        layers = range(config.num_hidden_layers) if "{layer}" in self.sources[0] else [0]
        return [
            Move(
                self.transform,
                tuple(name.format(layer=layer) for name in self.sources),
                tuple(name.format(layer=layer) for name in self.results),
                dict(arguments),
            )
            for layer in layers
        ]


@dataclass(frozen=True)
class ArchitecturePair:
    """A conversion from one architecture (by `config.model_type`) to another.

    Attributes:
        requirements: what the source's config must say.
        fields: field of the target's config → field of the source's config, or a function of
            it. Fields that have the same name in both are not listed.
        rules: where each tensor goes.
        positions: the table of learned positions, which the target does not have.
    """

    source: str
    target: str
    requirements: tuple[Requirement, ...]
    fields: Mapping[str, str | ConfigValue]
    rules: tuple[Rule, ...]
    positions: str | None = field(default=None)


def make_copy_rule(
    *names: str, when: Callable[[PreTrainedConfig], bool] = lambda config: True
) -> Rule:
    """Make a rule for tensors that keep their names."""
    return Rule("copy", names, names, when=when)


def make_renaming_rules(
    transform: str,
    source: str,
    result: str,
    *tensors: str,
    when: Callable[[PreTrainedConfig], bool] = lambda config: True,
) -> list[Rule]:
    """Make a rule per tensor, from `<source>.<tensor>` to `<result>.<tensor>`."""
    return [
        Rule(transform, (f"{source}.{tensor}",), (f"{result}.{tensor}",), when=when)
        for tensor in tensors
    ]


def is_untied(config: PreTrainedConfig) -> bool:
    return not config.tie_word_embeddings
