"""What an operation that calibrates is given to decide on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from surgery.calibration.options import Calibration
from surgery.calibration.view import Batch
from surgery.importance.estimate import Scorer
from surgery.models.sites import Site


@dataclass(frozen=True)
class Case:
    """One operation's model and data.

    Attributes:
        model: as the operations before it leave it; not to be changed.
        sites: of that model. They keep their numbers where an earlier operation took some away.
        batches: arguments of forward passes.
        scorer: who scores heads; ``None``: `surgery.importance` does, on `batches`.
        native: whether the architecture's own config must be able to say the result.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    batches: Sequence[Batch]
    options: Calibration
    scorer: Scorer | None = None
    native: bool = False
