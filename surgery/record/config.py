"""The record in a config.json, as plain data."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.models.own_record import METHOD

# 2 has lists of modules; what needs none is written as 1, which older versions read too.
FORMATS = (1, 2)


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
        tensors: dict[str, list[int]] | None = None,
        attributes: dict[str, dict[str, Any]] | None = None,
        steps: list[list[Any]] | None = None,
        lists: dict[str, int] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.tensors = tensors or {}
        self.attributes = attributes or {}
        self.steps = steps or []
        if lists:
            self.lists, self.format = lists, FORMATS[1]
