"""What can be refused of an estimator before any model is loaded."""

from __future__ import annotations

from surgery.config.schema import ObjectiveName
from surgery.errors import ConfigError
from surgery.importance.table import ESTIMATORS


def check_estimator(key: str, estimator: str, objective: ObjectiveName) -> None:
    """Raises: ConfigError, for an unknown estimator, or one that says nothing of `objective`."""
    if estimator not in ESTIMATORS:
        raise ConfigError(key, "no such estimator", given=estimator, valid=ESTIMATORS)
    if estimator == "gate_gradient" and objective is ObjectiveName.distill:
        raise ConfigError(
            "importance.objective",
            "the KL of a model to itself has no gradient: gate_gradient would be zero everywhere",
            given=objective.value,
            valid="lm, or estimator leave_one_out",
        )
