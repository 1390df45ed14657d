"""What an operation gets to calibrate: options, a model and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.importance.estimate import Scorer
from surgery.models.sites import Site


@dataclass(frozen=True)
class Calibration:
    """Options of `calibration`, without the amount of data.

    Attributes:
        rows: query rows drawn per sequence, over which attended values are averaged.
        refine_steps: gradient steps on a site's coefficients towards the original output of the
            site; 0: only the closed form.
        keep_batches: batches that the gradient steps go over: the inputs of a layer are kept for
            them; ``None``: all.
        refine_lr: first step size of the gradient steps, relative to the size of the coefficients.
        joint_steps: gradient steps, of a batch each, that fit all layers together towards
            what the original predicts; 0: none.
        refit: whether each output projection is solved again.
        ridge: ridge of that solution, relative to the mean second moment of its inputs; ``None``:
            what is best on text that it is not fitted to.
        budget_batches: batches on which the cost of each layer's head counts is measured.
        seed: seed of random draws.
    """

    rows: int = 64
    refine_steps: int = 240
    keep_batches: int | None = None
    refine_lr: float = 0.03
    joint_steps: int = 24
    refit: bool = True
    ridge: float | None = None
    budget_batches: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """The model and the data on which one operation calibrates.

    Attributes:
        model: the model after the operations before this one; it must not be changed.
        sites: the sites of that model. They keep their numbers if earlier ones were removed.
        batches: arguments of forward passes.
        scorer: scores heads; ``None``: `surgery.importance` does, on `batches`.
        native: whether the architecture's own config must describe the result.
        tokens, value_bytes: length, and bytes of a cached value, at which sizes are counted.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    batches: Sequence[Batch]
    options: Calibration
    scorer: Scorer | None = None
    native: bool = False
    tokens: int = 512
    value_bytes: int = 2
