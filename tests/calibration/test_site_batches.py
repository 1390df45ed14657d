"""By what errors are divided, position by position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from surgery.calibration.site_batches import SiteBatches, measure_size
from surgery.calibration.stream import open_streams
from surgery.models.sites import find_sites
from tests.calibration.models import batches, made


def test_it_is_the_root_mean_square() -> None:
    stream = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
    assert measure_size(stream).tolist() == [pytest.approx([12.5**0.5, 1250**0.5])]


def test_an_empty_position_does_not_count_for_all_others() -> None:
    stream = torch.ones(1, 4, 8)
    stream[0, 1] = 0
    least = measure_size(stream)[0]
    assert least[1] == pytest.approx(0.75e-3)
    assert least[0] == 1


def test_nothing_is_divided_by_zero() -> None:
    scale = 1 / measure_size(torch.zeros(1, 2, 8))
    assert torch.isfinite(scale.square()).all()


@pytest.mark.parametrize("changed", ["working", "original"])
def test_a_position_that_changes_below_made_huge_does_not_count_for_all_others(
    changed: str,
) -> None:
    """Nor does one that they keep from being huge."""
    model = made("llama", dtype=torch.float32)
    other, place = copy.deepcopy(model), 5

    def enlarge(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, place] += 1000 * torch.linspace(-1, 1, output.shape[-1])
        return output

    mlp = (other if changed == "working" else model).get_submodule("model.layers.0.mlp")
    mlp.register_forward_hook(enlarge)
    sites = find_sites(model).sites
    streams = open_streams((model, other), sites, batches(2), weights=[])
    text = SiteBatches(*streams, sites[1], 0)
    for view, aim in text.iterate_aims():
        assert view.output is not None
        missing = (aim.target - view.output) * aim.scale[..., None]
        assert float(missing[:, place].square().mean(-1).max()) < 1.5
        assert float(missing[:, place].square().mean(-1).min()) > 0.5
        assert float((aim.scale[:, place] * 500).max()) < 1.0
        assert float(aim.scale[:, :place].min()) > 0.1
