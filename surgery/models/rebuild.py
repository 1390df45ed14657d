"""A model built from its config, made what the record in that config tells of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from surgery.models.own_record import is_own_record


def rebuild_recorded(model: PreTrainedModel) -> None:
    """Give a model built from its config alone the structure that the record in it tells of.

    `from_pretrained` does that by itself, `from_config` does not.

    Raises:
        PlanError: the record is none of this model's.
    """
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None and is_own_record(stored):
        reader: Any = AutoHfQuantizer.from_config(stored)
        reader.validate_environment()
        reader._process_model_before_weight_loading(model)
