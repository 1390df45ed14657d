"""How many gradient steps a merge takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.calibration import Calibration
from surgery.operations.gqa import refine
from tests.calibration.models import batches, made, plan_for


@pytest.mark.parametrize(
    ("windows", "asked", "taken"),
    [(1, 200, refine.PASSES), (2, 200, 2 * refine.PASSES), (2, 50, 50)],
)
def test_little_text_gets_fewer_steps(
    windows: int, asked: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "PATIENCE", asked)
    count = 0
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam, *args: Any) -> Any:
        nonlocal count
        count += 1
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    model = made("llama", dtype=torch.float32)
    options = Calibration(refine_steps=asked, joint_steps=0)
    plan_for(model, batches(windows), options, kv_heads=2, merge="optimal")
    assert count == taken * model.config.num_hidden_layers
