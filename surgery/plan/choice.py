"""What an operation may make of one layer, for a search over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.models.sites import Site


@dataclass(frozen=True)
class Choice:
    """One thing that an operation may make of one layer.

    Attributes:
        operation: its name.
        name: in a few words, the same for the same change of any layer: ``2 KV heads``.
        after: the site as it is then, as far as its sizes go; ``None``: its attention is removed.
        given: what `Operation.join_choices` makes it from, as JSON; before it was tried, something
            of the same size.
    """

    operation: str
    name: str
    after: Site | None
    given: Any

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same change of any layer."""
        return self.operation, self.name


@dataclass(frozen=True)
class Chosen:
    """What takes the place of an operation that chooses others.

    Attributes:
        operations: in order, with nothing left to choose.
        figures: the numbers behind it, as JSON.
    """

    operations: tuple[Any, ...]
    figures: Mapping[str, Any]
