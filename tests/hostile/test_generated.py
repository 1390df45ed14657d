"""Generated input of every kind: refused with a key, or accepted; never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.hostile.bases import Bases
from tests.hostile.cases import Case, make_cases
from tests.hostile.try_case import empty, try_case

EXAMPLES = 500  # `make fuzz` tries 5,000, each bounded in time and memory


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


# Without shrinking: a case says what was changed, and is tried again by itself.
@settings(
    max_examples=EXAMPLES,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=make_cases())
def test_generated_input(
    case: Case, bases: Bases, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / "hostile"
    assert try_case(case, bases, empty(folder))
