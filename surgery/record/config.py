"""The record in a config.json, as plain data."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.config.hints import Count, find_misfit
from surgery.errors import PlanError
from surgery.models.own_record import METHOD

FORMAT = 1
_PARTS = {
    "tensors": dict[str, list[Count]],
    "attributes": dict[str, dict[str, Any]],
    "steps": list[tuple[str, dict[str, Any]]],
}


class RecordConfig(QuantizationConfigMixin):
    """What a model built only from the config would lack.

    Args:
        format: version of this layout.
        tensors: name → shape, for parameters whose shape the config does not give.
        attributes: module path → attribute → value.
        steps: [kind, arguments] of each step of a plan.
    """

    def __init__(
        self,
        format: int = FORMAT,
        tensors: dict[str, list[Count]] | None = None,
        attributes: dict[str, dict[str, Any]] | None = None,
        steps: list[list[Any]] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.tensors = tensors or {}
        self.attributes = attributes or {}
        self.steps = steps or []
        unknown = sorted(set(others) - {"quant_method"})
        if unknown:
            raise PlanError(f"the record has a key {unknown[0]!r} that this version does not know")

    def check(self) -> None:
        """Check the record's own form; whether it fits a model is the reader's to say.

        Raises:
            PlanError: another version wrote it, or a part has the wrong type or size.
        """
        if type(self.format) is not int or self.format != FORMAT:
            raise PlanError(f"a record of format {self.format}; this version reads {FORMAT}")
        for part, hint in _PARTS.items():
            misfit = find_misfit(getattr(self, part), hint, part)
            if misfit is not None:
                raise PlanError(f"the record is not complete: {misfit}")
