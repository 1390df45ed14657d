"""How calibration is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """Options of `calibration`, besides how much data there is.

    Attributes:
        rows: query rows drawn per sequence, over which attended values are averaged.
        refine_steps: gradient steps on a site's coefficients towards the original's output of the
            same site; 0 for the closed form alone.
        keep_batches: batches whose inputs of a layer are kept while it is calibrated: the steps go
            over these, and the layers below need not run again. The rest streams past.
        refine_lr: their first step size, as a share of the coefficients' own size.
        refit: whether each output projection is solved anew.
        ridge: of that, as a share of its inputs' mean second moment.
        budget_batches: batches on which a budget measures what each layer's count costs.
        seed: for what is drawn.
    """

    rows: int = 64
    refine_steps: int = 60
    keep_batches: int = 8
    refine_lr: float = 0.03
    refit: bool = True
    ridge: float = 1e-3
    budget_batches: int = 2
    seed: int = 0
