"""Writing the record: the difference between a model and what its config builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.models.own_record import is_own_record, read_recorded_attributes, read_recorded_steps
from surgery.models.reference import ReferenceModels, get_shapes
from surgery.plan.operation import Step
from surgery.record.config import RecordConfig


def write_record(
    model: PreTrainedModel, attributes: Mapping[str, Mapping[str, Any]], steps: Sequence[Step]
) -> None:
    """Put into `model.config` what `save_pretrained` must save and `from_pretrained` rebuild.

    An earlier record is taken over; what stands in it already is not said twice.

    Args:
        attributes, steps: what the last plan set and did; what the config says already is left
            out.
    """
    reference = ReferenceModels(model).get({})
    built = get_shapes(reference)
    tensors = {
        name: list(shape) for name, shape in get_shapes(model).items() if built.get(name) != shape
    }
    held: dict[str, dict[str, Any]] = {}
    for source in (read_recorded_attributes(model.config), attributes):
        for path, values in source.items():
            there = _module(model, path)
            if there is None:  # a later operation took it away
                continue
            fresh = vars(_module(reference, path) or nn.Identity())
            for name in values:
                now = vars(there).get(name)
                if name not in fresh or fresh[name] != now:
                    held.setdefault(path, {})[name] = list(now) if isinstance(now, tuple) else now
    done = [list(step) for step in read_recorded_steps(model.config)]
    done += [[s.kind, dict(s.arguments)] for s in steps if [s.kind, dict(s.arguments)] not in done]
    model.config.quantization_config = RecordConfig(tensors=tensors, attributes=held, steps=done)


def _module(model: PreTrainedModel, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def forget_record(model: PreTrainedModel) -> None:
    """Take the record out of `model.config`, whose other keys say all of it by now."""
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None and is_own_record(stored):
        del model.config.quantization_config
