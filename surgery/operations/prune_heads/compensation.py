"""What the heads of a site that stay would do if some more went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from surgery.calibration.output import OutputProblem
from surgery.calibration.output_moments import OutputMoments, sum_moments
from surgery.calibration.ridge import RIDGES, choose_ridge
from surgery.calibration.rows import put_parameter, to_plan_layout, widen
from surgery.models.sites import Site
from surgery.operations.prune_heads.refit import list_columns, set_output_, silence_


class Compensation:
    """Tries a site of a model without some of its heads, with the output projection solved anew.

    The ridge is chosen once, for the first that are tried.

    Args:
        problem: of the site in `work`, with all inputs.
        ridge: ``None``: what is best on held-out text, or no change where nothing is better.
    """

    def __init__(
        self, work: PreTrainedModel, site: Site, problem: OutputProblem, ridge: float | None
    ) -> None:
        self.work, self.site, self.problem = work, site, problem
        self._ridge, self._chosen = ridge, ridge is not None
        later = problem.folds[1:]
        # The first batches are what costs are measured on.
        self._rest = sum_moments(later if sum(fold.rows for fold in later) else problem.folds)

    @contextmanager
    def trying(self, left: Sequence[int]) -> Iterator[None]:
        """Let the model keep only these heads of the site."""
        projection = self.work.get_submodule(self.site.output.path)
        before = dict(projection.named_parameters(recurse=False))
        try:
            silence_(self.work, self.site, left)
            if left:
                set_output_(self.work, self.site, left, self._solve(left))
            yield
        finally:
            for name, parameter in before.items():
                put_parameter(projection, name, parameter)

    def _solve(self, left: Sequence[int]) -> dict[str, torch.Tensor]:
        weight, bias = self.problem.weight, self.problem.bias
        kept = list_columns(self.site, left).to(weight.device)
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[kept] = False
        columns = gone.nonzero().flatten()
        made, made_bias = widen(weight[:, kept]), None if bias is None else widen(bias)
        if not self._chosen:
            folds = [fold.drop(columns, weight) for fold in self.problem.folds]
            found = choose_ridge(folds, RIDGES, bias=bias is not None)
            enough = sum(fold.rows for fold in folds) >= made.shape[1]
            self._ridge, self._chosen = found.ridge if found.left < 1 and enough else None, True
        if self._ridge is not None:
            moments: OutputMoments = self._rest.drop(columns, weight)
            nothing = torch.zeros_like(made)
            change, bias_change = moments.solve(
                nothing, None if bias is None else nothing[:, 0], self._ridge
            )
            made = made + change
            if made_bias is not None and bias_change is not None:
                made_bias = made_bias + bias_change
        tensors = {"output": made}
        if made_bias is not None:
            tensors["output_bias"] = made_bias
        return to_plan_layout(self.site, tensors)
