"""The record in a config.json, as plain data."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.models.own_record import METHOD

FORMAT = 1


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
        tensors: dict[str, list[int]] | None = None,
        attributes: dict[str, dict[str, Any]] | None = None,
        steps: list[list[Any]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.tensors = tensors or {}
        self.attributes = attributes or {}
        self.steps = steps or []
