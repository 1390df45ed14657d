"""The words in which a pair of architectures is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from surgery.models.convert.moves import Move

Of = Callable[[PreTrainedConfig], Any]


@dataclass(frozen=True)
class Need:
    """What the source's config must say for the move to be exact.

    Attributes:
        field: the config field that stands in the way otherwise.
        met: whether it does not.
        why: end of the sentence `<field> is <value>: …`.
    """

    field: str
    met: Callable[[PreTrainedConfig], bool]
    why: str

    def reason(self, config: PreTrainedConfig) -> str:
        """Why not; empty where the need is met."""
        if self.met(config):
            return ""
        return f"{self.field} is {getattr(config, self.field, None)!r}: {self.why}"


@dataclass(frozen=True)
class Rule:
    """A `Move` for every layer, where its names hold ``{layer}``; else for the whole model.

    Attributes:
        arguments: the move's arguments, from the source's config.
        when: whether the source has these tensors at all.
    """

    transform: str
    sources: tuple[str, ...]
    results: tuple[str, ...]
    arguments: Callable[[PreTrainedConfig], Mapping[str, Any]] = lambda config: {}
    when: Callable[[PreTrainedConfig], bool] = lambda config: True

    def moves(self, config: PreTrainedConfig) -> list[Move]:
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
class Pair:
    """A move from one architecture (by `config.model_type`) to another.

    Attributes:
        needs: what the source's config must say.
        fields: fields of the target's config: the source field they are read from, or a function
            of the source's config. Fields of the same name are read without being named here.
        rules: where each tensor goes.
        positions: the table of learned positions, which has no place in the target.
    """

    source: str
    target: str
    needs: tuple[Need, ...]
    fields: Mapping[str, str | Of]
    rules: tuple[Rule, ...]
    positions: str | None = field(default=None)


def copies(*names: str, when: Callable[[PreTrainedConfig], bool] = lambda config: True) -> Rule:
    """The same names on both sides, one tensor each."""
    return Rule("copy", names, names, when=when)


def renamed(
    transform: str,
    source: str,
    result: str,
    *tensors: str,
    when: Callable[[PreTrainedConfig], bool] = lambda config: True,
) -> list[Rule]:
    """`<source>.<tensor>` to `<result>.<tensor>`, one rule per tensor."""
    return [
        Rule(transform, (f"{source}.{tensor}",), (f"{result}.{tensor}",), when=when)
        for tensor in tensors
    ]


def is_untied(config: PreTrainedConfig) -> bool:
    return not config.tie_word_embeddings
