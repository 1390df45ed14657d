"""Rebuild a recorded model while transformers loads it: on the meta device, before weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from surgery.errors import PlanError
from surgery.record.config import FORMATS, RecordConfig


class RecordReader(HfQuantizer):
    """Uses transformers' plug-in point for other structures; nothing is quantized."""

    requires_calibration = False
    quantization_config: RecordConfig

    def __init__(self, quantization_config: RecordConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        version = self.quantization_config.format
        if version not in FORMATS:
            known = " and ".join(map(str, FORMATS))
            raise PlanError(f"a record of format {version}; this version reads {known}")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers is half imported where this file is.
        from surgery.models.attributes import set_attributes
        from surgery.models.lists import set_length

        record = self.quantization_config
        self._run_steps(model)  # first, since they may replace modules
        for path, length in getattr(record, "lists", {}).items():
            with _naming_part(path):
                set_length(model, path, length)
        for name, shape in record.tensors.items():
            path, _, attribute = name.rpartition(".")
            with _naming_part(name):
                module = model.get_submodule(path)
                old = getattr(module, attribute)
                hollow = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
                setattr(module, attribute, nn.Parameter(hollow, requires_grad=old.requires_grad))
        for path, values in record.attributes.items():
            with _naming_part(path):
                set_attributes(model, {path: values})
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._run_steps(model)  # again, since some compute values, which need real memory
        return model

    def _run_steps(self, model: Any) -> None:
        # transformers is half imported where this file is.
        from surgery.plan.registry import is_step, run_step

        for kind, arguments in self.quantization_config.steps:
            if not is_step(kind):
                raise PlanError(f"the record has a step {kind!r} that this version does not know")
            with _naming_part(f"step {kind}"):
                run_step(kind, model, arguments)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@contextmanager
def _naming_part(what: str) -> Iterator[None]:
    """Turn an error into a `PlanError` that names the part of the record that does not fit."""
    try:
        yield
    except (AttributeError, TypeError, KeyError) as error:
        raise PlanError(f"the record does not fit the model, at {what}: {error}") from error
