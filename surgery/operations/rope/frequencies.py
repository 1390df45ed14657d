"""The frequencies of a rotary module, against what transformers defines for their type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from surgery.errors import ConfigError
from surgery.models.rotary import (
    RotaryModule,
    build_rotary,
    compute_rotation,
    get_frequencies,
    list_nested_types,
)

KEY = "attention.rope"
# What classes raise for a config they cannot use.
FAULTS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
_TOLERANCE = 1e-6


def check_frequencies(old: RotaryModule, new: RotaryModule) -> None:
    """Check that a rotary module computes what its config's type defines.

    Args:
        old: the module before its config was changed.

    Raises:
        ConfigError: it does not, or cannot.
    """
    for kind in list_kinds(new):
        parameters = get_parameters(new.config, kind)
        if kind is not None and parameters == get_parameters(old.config, kind):
            continue
        name, rope_type = type(new).__name__, parameters["rope_type"]
        try:
            fresh = build_rotary(new, new.config)
            defined = _compute_defined(new.config, kind)
        except FAULTS as error:
            raise ConfigError(
                f"{KEY}.type", f"{name} cannot compute type {rope_type}: {format_error(error)}"
            ) from None
        # What an architecture computes differently from the start cannot be judged.
        own_way = rope_type == "default" and not _are_equal(
            get_frequencies(build_rotary(old, old.config), kind), _compute_plain(old.config, kind)
        )
        if not own_way and not _are_equal(get_frequencies(fresh, kind), defined):
            raise _make_ignored_error(name, parameters)
        if rope_type in ("dynamic", "longrope"):
            _check_grows(fresh, kind)


def _check_grows(module: RotaryModule, kind: str | None) -> None:
    """Check that a module whose frequencies depend on the length really uses it."""
    config = module.config
    parameters = get_parameters(config, kind)
    length = int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
    compute_rotations(module, kind, last=length + 15)
    wanted = _compute_defined(config, kind, length + 16)
    if not _are_equal(get_frequencies(module, kind), wanted):
        raise ConfigError(
            f"{KEY}.type",
            f"{type(module).__name__} never looks at the length, so type "
            f"{parameters['rope_type']} would do nothing",
            given=parameters["rope_type"],
            valid="linear, yarn, llama3",
        )


def _make_ignored_error(name: str, parameters: Mapping[str, Any]) -> ConfigError:
    rope_type, partial = parameters["rope_type"], parameters.get("partial_rotary_factor")
    if partial is not None and rope_type == "default":
        return ConfigError(
            f"{KEY}.partial_rotary_factor",
            f"{name} ignores it for type default",
            given=partial,
            valid="null, or type proportional",
        )
    return ConfigError(
        f"{KEY}.type",
        f"{name} computes other frequencies than type {rope_type} defines",
        given=rope_type,
    )


def list_kinds(module: RotaryModule) -> list[str | None]:
    """List the layer types a rotary module computes for; one ``None`` where it has no types."""
    nested = list_nested_types(module.config)
    return [kind for kind in nested if hasattr(module, f"{kind}_inv_freq")] if nested else [None]


def _compute_defined(
    config: PreTrainedConfig, kind: str | None, length: int | None = None
) -> tuple[torch.Tensor, float]:
    """Compute what transformers defines for the type in `config`."""
    rope_type = get_parameters(config, kind)["rope_type"]
    if rope_type == "default":
        return _compute_plain(config, kind)
    function = ROPE_INIT_FUNCTIONS[rope_type]
    inverse, scaling = function(
        copy.deepcopy(config), torch.device("cpu"), seq_len=length, layer_type=kind
    )
    return inverse, float(scaling)


def _compute_plain(config: PreTrainedConfig, kind: str | None) -> tuple[torch.Tensor, float]:
    """Compute unscaled RoPE: θ^(-2i/d) for the i-th pair of d rotated dimensions."""
    parameters = get_parameters(config, kind)
    width = int(get_head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
    steps = torch.arange(0, width, 2, dtype=torch.float) / width
    return 1.0 / parameters["rope_theta"] ** steps, 1.0


def get_head_dim(config: PreTrainedConfig) -> int:
    """Get the dimensions of a head, which a config need not state."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def get_parameters(config: PreTrainedConfig, kind: str | None) -> dict[str, Any]:
    """Get the flat `rope_parameters` of a layer type, or of all layers."""
    parameters = config.rope_parameters
    return dict(parameters if kind is None else parameters[kind] or {})


def _are_equal(a: tuple[torch.Tensor, float], b: tuple[torch.Tensor, float]) -> bool:
    if a[0].shape != b[0].shape or abs(a[1] - b[1]) > _TOLERANCE:
        return False
    return torch.allclose(a[0].float(), b[0].float(), rtol=1e-5, atol=0.0)


def compute_rotations(
    module: RotaryModule, kind: str | None, last: int = 7
) -> tuple[torch.Tensor, ...]:
    """Compute cos and sin [1, 8, …] of the eight positions up to `last`, or one complex tensor."""
    ids = torch.arange(last - 7, last + 1)[None]
    given = compute_rotation(module, torch.zeros(1), ids, kind)
    return (given,) if isinstance(given, torch.Tensor) else tuple(given)


def format_error(error: BaseException) -> str:
    """Format an error of other code on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())}"
