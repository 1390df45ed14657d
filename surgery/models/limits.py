"""What a model's config may say, before anything is built of it, and what building it may take.

The config is somebody else's file: a size of 10⁹ in it must not be met by filling the memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING

from surgery.config.hints import shorten
from surgery.config.options import SHARE, Range
from surgery.errors import ConfigError

# Words in the names of fields, and the most that they can mean. The largest models have some
# hundred layers, thousands of experts, and 20 thousand features.
_MOST = (
    (re.compile(r"label"), 1_000_000),
    (re.compile(r"layer|block|depth|stage|expert|head|codebook|group"), 10_000),
    (re.compile(r"vocab|position|length|window|n_ctx"), 1_000_000_000),
    (re.compile(r"size|dim|width|embd|inner|d_model|d_ff|d_kv|hidden|channels"), 100_000_000),
)
_DROPOUT = re.compile(r"drop(out|_?path|_?rate|_?prob)|pdrop|layerdrop|_drop$")
# Of a whole model. The most known is 150 thousand: Switch-C, of 2,048 experts in a layer.
MOST_MODULES = 500_000


class TooManyModulesError(Exception):
    """A config describes a model of more modules than any model has."""


def check_fields(fields: Mapping[str, Any], key: str, given: Any, prefix: str = "") -> None:
    """Check the fields of a config that no class of transformers checks before it uses them.

    Args:
        fields: of a config.json, or what takes its place.
        key: config key of the model, for messages.
        given: its value.

    Raises:
        ConfigError: naming the field, its value and what is valid.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            check_fields(value, key, given, f"{prefix}{name}.")
            continue
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        bounds = _find_bounds(name)
        for number in numbers:
            found = _find_fault(number, bounds, is_share=bounds is SHARE)
            if found:
                raise ConfigError(
                    key,
                    f"the config's {prefix}{name} is {shorten(value)}, and must be {found}",
                    given=given,
                    valid=f"{name}: {found}",
                )


def _find_bounds(name: str) -> Range | None:
    low = name.lower()
    if _DROPOUT.search(low):
        return SHARE
    return next((Range(high=most) for words, most in _MOST if words.search(low)), None)


def _find_fault(value: Any, bounds: Range | None, *, is_share: bool) -> str | None:
    """Find what `value` must be instead; ``None`` if it is all right."""
    if isinstance(value, float) and math.isnan(value):
        return str(bounds) if bounds is not None else "a number"
    if is_share and isinstance(value, (str, list)):
        return f"a number {bounds}"
    if bounds is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) or is_share:
        return None if value in bounds else str(bounds)
    return None


def explain_zeros(config: Any) -> str:
    """List the sizes of a config that are zero or less where its class has more; "" for none."""
    try:
        default = CONFIG_MAPPING[config.model_type]()
    except Exception:  # whatever a class raises where it has no defaults
        return ""
    found = [
        f"{name}={shorten(value)}"
        for name, value in vars(config).items()
        if type(value) is int and value < 1 and not re.search(r"_ids?$|idx$|index$", name)
        if type(usual := getattr(default, name, None)) is int and usual > 0
    ]
    return ", ".join(found)


@contextmanager
def limiting_modules(most: int = MOST_MODULES) -> Iterator[None]:
    """Let no model of more than `most` modules be built inside the block.

    Raises:
        TooManyModulesError: as soon as that many are there.
    """
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise TooManyModulesError(f"more than {most:,} modules")

    handle = register_module_module_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def check_tensors(model: nn.Module, config: Any, key: str, given: Any) -> None:
    """Check that a model on the meta device has layers, and weights with elements.

    Raises:
        ConfigError: it has not; the sizes that are zero are named.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    empty = next((name for name, p in model.named_parameters() if p.numel() == 0), None)
    if empty is None and not (type(layers) is int and layers < 1):
        return
    problem = "the config gives a model without layers"
    if empty is not None:
        problem = f"the config gives {empty} the shape {list(model.get_parameter(empty).shape)}"
    zeros = explain_zeros(config)
    raise ConfigError(
        key, f"{problem}{f' ({zeros})' if zeros else ''}", given=given, valid="sizes from 1 on"
    )


def check_memory(model: nn.Module, dtype: torch.dtype | None, key: str, given: Any) -> None:
    """Check that the machine can hold the weights of a model that is on the meta device.

    Args:
        dtype: in which the weights are loaded; ``None``: as the model has them.

    Raises:
        ConfigError: it cannot.
    """
    memory = find_memory()
    if memory is None:
        return
    needed = sum(
        tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in chain(model.parameters(), model.buffers())
    )
    if needed > memory:
        raise ConfigError(
            key,
            f"its weights need {needed / 1e9:,.1f} GB of memory, and this machine has "
            f"{memory / 1e9:,.1f} GB",
            given=given,
            valid="a smaller model, model.dtype=bfloat16, or a machine with more memory",
        )


def find_memory() -> int | None:
    """Find the bytes of memory and swap that this process may use; ``None`` if it is not known."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        swap = re.search(r"SwapTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        total += int(swap[1]) * 1024 if swap else 0
    except (ValueError, OSError, AttributeError):  # not Linux
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # another version of cgroups, or no limit ("max")
            continue
    return total
