"""The record in a config.json, as plain data."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.config.hints import Count, find_misfit
from surgery.errors import PlanError
from surgery.models.own_record import METHOD

# 2 has lists of modules; what needs none is written as 1, which older versions read too.
FORMATS = (1, 2)
_PARTS = {
    "tensors": dict[str, list[Count]],
    "attributes": dict[str, dict[str, Any]],
    "steps": list[tuple[str, dict[str, Any]]],
    "lists": dict[str, Count],
}


class RecordConfig(QuantizationConfigMixin):
    """What a model built only from the config would lack.

    Args:
        format: version of this layout, one of `FORMATS`.
        tensors: name → shape, for parameters whose shape the config does not give.
        attributes: module path → attribute → value.
        steps: [kind, arguments] of each step of a plan.
        lists: path → length, for lists of modules that have one for each head.
    """

    def __init__(
        self,
        format: int = FORMATS[0],
        tensors: dict[str, list[Count]] | None = None,
        attributes: dict[str, dict[str, Any]] | None = None,
        steps: list[list[Any]] | None = None,
        lists: dict[str, Count] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.tensors = tensors or {}
        self.attributes = attributes or {}
        self.steps = steps or []
        if lists:
            self.lists = lists
        unknown = sorted(set(others) - {"quant_method"})
        if unknown:
            raise PlanError(f"the record has a key {unknown[0]!r} that this version does not know")

    def check(self) -> None:
        """Check the record's own form; whether it fits a model is the reader's to say.

        Raises:
            PlanError: another version wrote it, or a part has the wrong type or size.
        """
        if type(self.format) is not int or self.format not in FORMATS:
            known = " and ".join(map(str, FORMATS))
            raise PlanError(f"a record of format {self.format}; this version reads {known}")
        for part, hint in _PARTS.items():
            misfit = find_misfit(getattr(self, part, {}), hint, part)
            if misfit is not None:
                raise PlanError(f"the record is not complete: {misfit}")
