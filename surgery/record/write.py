"""Write the record: the difference between a model and what its config builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.models.attributes import to_plain
from surgery.models.lists import list_lengths
from surgery.models.own_record import find_record, read_recorded_attributes, read_recorded_steps
from surgery.models.reference import ReferenceModels, get_shapes
from surgery.plan.draft import Step
from surgery.record.config import FORMATS, RecordConfig


def write_record(
    model: PreTrainedModel, attributes: Mapping[str, Mapping[str, Any]], steps: Sequence[Step]
) -> None:
    """Write into `model.config` what `from_pretrained` needs to rebuild the model.

    The content of an earlier record is kept, and nothing is written twice.

    Args:
        attributes, steps: what the last plan set and did; what the config already gives is left
            out.
    """
    reference = ReferenceModels(model).get({})
    built = get_shapes(reference)
    tensors = {
        name: list(shape) for name, shape in get_shapes(model).items() if built.get(name) != shape
    }
    recorded: dict[str, dict[str, Any]] = {}
    for source in (read_recorded_attributes(model.config), attributes):
        for path, values in source.items():
            module = _get_module(model, path)
            if module is None:  # a later operation removed it
                continue
            fresh = vars(_get_module(reference, path) or nn.Identity())
            for name in sorted(vars(module).keys() & values.keys()):
                value = vars(module)[name]
                if name not in fresh or fresh[name] != value:
                    recorded.setdefault(path, {})[name] = to_plain(value)
    done = [list(step) for step in read_recorded_steps(model.config)]
    done += [[s.kind, dict(s.arguments)] for s in steps if [s.kind, dict(s.arguments)] not in done]
    lengths = list_lengths(reference)
    lists = {p: n for p, n in list_lengths(model).items() if lengths.get(p, n) != n}
    model.config.quantization_config = RecordConfig(
        format=FORMATS[1 if lists else 0],
        tensors=tensors,
        attributes=recorded,
        steps=done,
        lists=lists,
    )


def _get_module(model: PreTrainedModel, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def forget_record(model: PreTrainedModel) -> None:
    """Remove the record from `model.config`, whose other keys now describe everything."""
    if find_record(model.config) is not None:
        del model.config.quantization_config
