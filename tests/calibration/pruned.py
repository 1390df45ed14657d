"""What tests of pruned models share: text, made-up scores, plans, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.importance import ScoreTable, SiteScores
from surgery.models.sites import Site
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.calibration.models import unseen
from tests.families import logits, tokens

OPTIONS = Calibration(refine_steps=0, joint_steps=0)
# [layer][head]; the lowest of each layer are 2 5 0, and 7 1 6.
SCORES = [[0.3, 0.8, 0.1, 0.7, 0.9, 0.2, 0.6, 0.5], [0.9, 0.3, 0.8, 0.7, 0.6, 0.9, 0.4, 0.2]]


def batches(count: int = 2, size: int = 4) -> list[dict[str, torch.Tensor]]:
    found = [tokens(size, 20, 100 + n) for n in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in found]


def parsed(prune: dict[str, Any]) -> Any:
    return parse_operations({"prune_heads": prune})


def planned(
    model: PreTrainedModel,
    prune: dict[str, Any],
    *more: dict[str, Any],
    data: Any = None,
    options: Calibration = OPTIONS,
    **making: Any,
) -> Plan:
    operations = [o for one in ({"prune_heads": prune}, *more) for o in parse_operations(one)]
    return make_calibrated_plan(
        model, operations, batches() if data is None else data, options, **making
    )


def table_of(scores: Sequence[Sequence[float]] = SCORES) -> Any:
    """A scorer that knows the scores of heads already, and sums them for groups."""

    def scorer(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        found = []
        for site in sites:
            row, size = scores[site.layer], site.group_size
            if unit == "groups":
                row = [sum(row[n : n + size]) for n in range(0, len(row), size)]
            errors = (0.1,) * (len(row) - 1) + (float("nan"),)
            found.append(SiteScores(site.layer, site.path, tuple(row), errors))
        both: dict[str, Any] = {"heads": None, "groups": None, unit: tuple(found)}
        return ScoreTable(estimator, "lm", **both)

    return scorer


def assert_equal(one: PreTrainedModel, two: PreTrainedModel) -> None:
    state = two.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def assert_same(model: PreTrainedModel, expected: torch.Tensor, share: float = 1e-5) -> None:
    atol = share * float(expected.abs().max())
    torch.testing.assert_close(
        logits(model, unseen()).double(), expected.double(), rtol=0, atol=atol
    )
