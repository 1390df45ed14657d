"""Heads that are left make up for those that went: each output projection solved anew.

Closed-form compensation, as in Optimal Brain Surgeon (Hassibi & Stork 1992) and, for structures,
ZipLM (Kurtic et al. 2023, arXiv:2302.04089); here towards what the site of the original puts out,
on the stream of the already pruned layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.output import pose_problem, solve_output
from surgery.calibration.refusals import refuse_repeated, refuse_shared
from surgery.calibration.rows import put_parameter, to_plan_layout
from surgery.calibration.site_batches import SiteBatches
from surgery.calibration.stream import Weights, open_streams
from surgery.console import track_progress
from surgery.data.collate import Batch
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site


@dataclass(frozen=True)
class Refit:
    """One site's output projection.

    Attributes:
        tensors: ``output`` [D_model, kept heads * unit] in the architecture's layout, and
            ``output_bias`` [D_model] where there is one.
        figures: what the site's output on the data is off by, as a share of its root mean square:
            `output_error_cut` with the heads simply gone, `output_error_refit` afterwards,
            `output_error_held_out` on text that the projection was not fitted to; and the `ridge`.
    """

    tensors: dict[str, torch.Tensor]
    figures: dict[str, float | None] = field(default_factory=dict)


class Refitted(NamedTuple):
    """What `refit_sites` found.

    Attributes:
        sites: path → result, of every site that keeps some of its heads.
        model: a copy that computes what the pruned model will, with all heads in their places.
    """

    sites: dict[str, Refit]
    model: PreTrainedModel


@torch.no_grad()
def refit_sites(
    model: PreTrainedModel,
    sites: Sequence[Site],
    left: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    options: Calibration,
    weights: Weights | None = None,
) -> Refitted:
    """Solve the output projection of every site that loses some of its heads.

    Args:
        model: with all its heads, whose outputs are aimed at; not changed.
        sites: in the order of the forward pass.
        left: site path → query heads that stay.
        weights: what positions count, as for `open_streams`.

    Raises:
        SiteError: a site shares its weights with another, or cannot be seen at work.
    """
    changed = [site for site in sites if len(left[site.path]) < site.q_heads]
    fitted = [site for site in changed if left[site.path]]
    work, found = make_sharing_copy(model), {}
    with track_progress("refit", len(fitted) * len(batches)) as steps:
        refuse_shared(model, changed)
        refuse_repeated(model, changed, batches[0])
        original, working = open_streams((model, work), changed, batches, weights)
        for site in changed:
            silence_(work, site, left[site.path])
            if site not in fitted:
                continue
            text = SiteBatches(original, working, site, 0)
            steps.describe(f"refit, layer {site.layer}")
            found[site.path] = _refit_site(text, left[site.path], options.ridge, steps.advance)
            set_output_(work, site, left[site.path], found[site.path].tensors)
    return Refitted(found, work)


def _refit_site(
    text: SiteBatches, heads: Sequence[int], ridge: float | None, advance: Callable[[], None]
) -> Refit:
    site = text.site
    solved = solve_output(pose_problem(text, advance, list_columns(site, heads)), ridge)
    tensors = {"output": solved.weight.float()}
    if solved.bias is not None:
        tensors["output_bias"] = solved.bias.float()
    figures = {
        "output_error_cut": solved.before,
        "output_error_refit": solved.fitted,
        "output_error_held_out": solved.held_out,
        "ridge": solved.ridge,
    }
    return Refit({role: t.cpu() for role, t in to_plan_layout(site, tensors).items()}, figures)


def list_columns(site: Site, heads: Sequence[int]) -> torch.Tensor:
    """List the features of the output projection's input that belong to `heads`."""
    unit = site.output.unit
    columns = [head * unit + n for head in heads for n in range(unit)]
    return torch.tensor(columns, dtype=torch.long)


def silence_(work: PreTrainedModel, site: Site, heads: Sequence[int]) -> None:
    """Let `work` read nothing of the site's other heads."""
    name = f"{site.output.path}.weight"
    weight = work.get_parameter(name)
    axis = 0 if site.output.transposed else 1
    columns = list_columns(site, heads).to(weight.device)
    made = torch.zeros_like(weight)
    made.index_copy_(axis, columns, weight.index_select(axis, columns))
    put_parameter(work, name, nn.Parameter(made, requires_grad=False))


def set_output_(
    work: PreTrainedModel, site: Site, heads: Sequence[int], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Let `work` compute what the pruned site will, by the tensors of a `Refit`."""
    name = f"{site.output.path}.weight"
    weight = work.get_parameter(name)
    axis = 0 if site.output.transposed else 1
    columns = list_columns(site, heads).to(weight.device)
    given = tensors["output"].to(device=weight.device, dtype=weight.dtype)
    put_parameter(
        work, name, nn.Parameter(weight.index_copy(axis, columns, given), requires_grad=False)
    )
    if "output_bias" in tensors:
        name = f"{site.output.path}.bias"
        bias = work.get_parameter(name)
        given = tensors["output_bias"].to(device=bias.device, dtype=bias.dtype)
        put_parameter(work, name, nn.Parameter(given, requires_grad=False))
