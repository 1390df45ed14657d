"""Rebuild a recorded model while transformers loads it: on the meta device, before weights.

A record is somebody else's file. All of a part is checked before any of it is done: see
`surgery.models.attributes.check_attributes` and `surgery.plan.registry.check_step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from surgery.errors import PlanError
from surgery.record.config import RecordConfig

_MOST_ELEMENTS = 2**40


class RecordReader(HfQuantizer):
    """Uses transformers' plug-in point for other structures; nothing is quantized."""

    requires_calibration = False
    quantization_config: RecordConfig

    def __init__(self, quantization_config: RecordConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.check()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers is half imported where this file is.
        from surgery.models.attributes import check_attributes, set_attributes
        from surgery.models.lists import set_length
        from surgery.models.sites import find_sites
        from surgery.plan.registry import check_step, is_recordable

        record = self.quantization_config
        for kind, arguments in record.steps:
            with _naming_part("steps"):
                check_step(kind, arguments)
            if not is_recordable(kind):
                raise PlanError(f"the record has a step {kind!r}, which no plan records")
        with _naming_part("attributes"):
            check_attributes(model, record.attributes)
        before = find_sites(model).sites
        self._run_steps(model)  # first, since they may replace modules
        for path, length in getattr(record, "lists", {}).items():
            with _naming_part(path):
                _check_list(before, path, length)
                set_length(model, path, length)
        for name, shape in record.tensors.items():
            with _naming_part(name):
                _check_tensor(model, name, shape)
        for name, shape in record.tensors.items():
            path, _, attribute = name.rpartition(".")
            old = model.get_parameter(name)
            hollow = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
            fresh = nn.Parameter(hollow, requires_grad=old.requires_grad)
            setattr(model.get_submodule(path), attribute, fresh)
        held = {
            path: {name: vars(model.get_submodule(path)).get(name) for name in values}
            for path, values in record.attributes.items()
        }
        set_attributes(model, record.attributes)
        _check_counts(model, before, held)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._run_steps(model)  # again, since some compute values, which need real memory
        return model

    def _run_steps(self, model: Any) -> None:
        # transformers is half imported where this file is.
        from surgery.plan.registry import run_step

        for kind, arguments in self.quantization_config.steps:
            with _naming_part(f"step {kind}"):
                run_step(kind, model, arguments)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_list(sites: Any, path: str, length: int) -> None:
    """Check that a list of modules can be one with a module per head of an attention block."""
    most = max((site.q_heads for site in sites if path.startswith(f"{site.path}.")), default=0)
    if length > most:
        raise PlanError(f"no attention block has {length} heads of its own there")


def _check_tensor(model: Any, name: str, shape: list[int]) -> None:
    """Check that a parameter is there, and can have this shape: other sizes, but as many."""
    old = model.get_parameter(name)
    if len(shape) != old.ndim:
        raise PlanError(f"it has {old.ndim} dimensions, not {len(shape)}")
    if math.prod(shape) > _MOST_ELEMENTS:
        raise PlanError(f"{shape} is larger than any tensor of a model")


def _check_counts(model: Any, before: Any, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that blocks can still be read, and hold the head counts that their tensors have.

    Args:
        before: the sites of the model without the record.
        held: what its modules held where the record sets attributes.
    """
    # transformers is half imported where this file is.
    from surgery.models.sites import find_sites, names

    anatomy = find_sites(model)
    old_sites = {site.path: site for site in before}
    for block in anatomy.unreadable:
        if block.path in old_sites:
            raise PlanError(f"the record does not fit the model, at {block.path}: {block.reason}")
    for site in anatomy.sites:
        old = old_sites.get(site.path, site)
        counts = dict.fromkeys(names.Q_HEADS, (old.q_heads, site.q_heads))
        counts |= dict.fromkeys(names.KV_HEADS, (old.kv_heads, site.kv_heads))
        counts[names.GROUPS] = old.group_size, site.group_size
        module = model.get_submodule(site.path)
        # A config that was changed later sets this one as well.
        values = {n: v for n, v in vars(module).items() if n == names.GROUPS}
        for name, value in {**values, **held.get(site.path, {})}.items():
            # Whether an attribute is such a count, its value before tells.
            was, count = counts.get(name, (None, None))
            if count is None or value not in (was, None) or getattr(module, name) == count:
                continue
            raise PlanError(
                f"the record does not fit the model, at {site.path}.{name}: it is "
                f"{getattr(module, name)}, but the tensors are for {count}"
            )


@contextmanager
def _naming_part(what: str) -> Iterator[None]:
    """Turn an error into a `PlanError` that names the part of the record that does not fit."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, PlanError) as error:
        raise PlanError(f"the record does not fit the model, at {what}: {error}") from error
