"""What the heads of a site that stay would do if some more went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from surgery.calibration.output import OutputProblem
from surgery.calibration.output_moments import compute_unit, sum_moments
from surgery.calibration.ridge import RIDGES, choose_ridge
from surgery.calibration.rows import put_parameter, to_plan_layout, widen
from surgery.models.sites import Site
from surgery.operations.prune_heads.refit import list_columns, set_output_, silence_


class Surgeon:
    """What the site's output loses if inputs go one after the other, in closed form.

    Optimal Brain Surgeon (Hassibi & Stork 1992) on blocks: the least error |X W^T - X' W'^T|² of
    inputs X' without some columns, with a ridge on the change of W; the rest make up for them.

    Args:
        square: [N, N], second moments of the inputs.
        weight: [D, N], the present projection.
        ridge: relative to the mean second moment.
    """

    def __init__(self, square: torch.Tensor, weight: torch.Tensor, ridge: float) -> None:
        damped = square.clone()
        damped.diagonal().add_(ridge * compute_unit(square, bias=False))
        self.inverse, self.weight = torch.linalg.inv(damped), widen(weight).clone()

    def compute_error(self, columns: torch.Tensor) -> float:
        """Compute what is lost if these go too."""
        rows = self.weight[:, columns].mT
        return float((torch.linalg.solve(self.inverse[columns][:, columns], rows) * rows).sum())

    def remove(self, columns: torch.Tensor) -> None:
        """Let these go, and the others make up for them."""
        rows = self.inverse[columns]
        factor = torch.linalg.solve(rows[:, columns], rows)
        self.weight = self.weight - self.weight[:, columns] @ factor
        self.inverse = self.inverse - rows.mT @ factor


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

    def make_surgeon(self, left: Sequence[int]) -> Surgeon:
        """Make a surgeon for the heads that are there, with the ridge of what was tried."""
        weight = self.problem.weight
        square, _ = self._rest.get_equations(bias=False)
        ridge = max(RIDGES) if self._ridge is None else self._ridge
        surgeon = Surgeon(square, weight, ridge)
        gone = [head for head in range(self.site.q_heads) if head not in set(left)]
        if gone:
            surgeon.remove(list_columns(self.site, gone).to(weight.device))
        return surgeon

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

    def choose_ridge(self, left: Sequence[int]) -> None:
        """Choose the ridge for the site with these heads, unless it is chosen."""
        if self._chosen:
            return
        weight, bias = self.problem.weight, self.problem.bias
        columns = self._list_gone(left)
        folds = [fold.drop(columns, weight) for fold in self.problem.folds]
        found = choose_ridge(folds, RIDGES, bias=bias is not None)
        enough = sum(fold.rows for fold in folds) >= weight.shape[1] - len(columns)
        self._ridge, self._chosen = found.ridge if found.left < 1 and enough else None, True

    def _solve(self, left: Sequence[int]) -> dict[str, torch.Tensor]:
        weight, bias = self.problem.weight, self.problem.bias
        kept = list_columns(self.site, left).to(weight.device)
        made, made_bias = widen(weight[:, kept]), None if bias is None else widen(bias)
        self.choose_ridge(left)
        if self._ridge is not None:
            moments = self._rest.drop(self._list_gone(left), weight)
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

    def _list_gone(self, left: Sequence[int]) -> torch.Tensor:
        weight = self.problem.weight
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[list_columns(self.site, left).to(weight.device)] = False
        return gone.nonzero().flatten()
