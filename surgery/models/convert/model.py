"""Convert a model in memory."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConversionError, PlanError
from surgery.models.convert.config import (
    Positions,
    convert_config,
    find_pair,
    get_model_class,
    map_tensors,
)
from surgery.models.convert.moves import Move, run_move


def convert_model(
    model: PreTrainedModel, into: str, positions: Positions | None = None
) -> PreTrainedModel:
    """Convert a model to another architecture. `model` itself does not change.

    Tensors that are only renamed are shared between the two models; the others are new. Dtypes,
    device, training mode, `requires_grad`, ties and the generation config stay the same. Rotary
    frequencies are computed from the config. This works on the meta device too.

    Args:
        model: a causal language model on one device, as its config describes it.
        into: model type of the new architecture.
        positions: what replaces learned positions, in models that have them: ``{"theta": base}``
            for RoPE or ``{"nope": true}`` for no positions.

    Raises:
        ConversionError: the conversion would not be exact.
        PlanError: the model does not have the tensors that its config describes.
    """
    config = model.config
    pair = find_pair(config, into, positions)
    expected = get_model_class(config)
    if type(model) is not expected:
        raise ConversionError(
            f"only a {expected.__name__} can be converted",
            given=type(model).__name__,
        )
    moves = map_tensors(config, into, positions)
    sources = dict(model.named_parameters())
    _check_sources(model, sources, moves, pair.positions)

    new_config = convert_config(config, into, positions)
    with torch.device("meta"):
        new = get_model_class(new_config)(new_config)
    for move in moves:
        _convert_tensors(move, sources, new)
    if new_config.tie_word_embeddings:
        new.tie_weights()
    device = next(iter(sources.values())).device
    if device.type != "meta":
        _rebuild_buffers(new, device)
    new.generation_config = deepcopy(model.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        new.gradient_checkpointing_enable()
    return new.train(model.training)


def _check_sources(
    model: nn.Module, sources: dict[str, nn.Parameter], moves: list[Move], positions: str | None
) -> None:
    moved = [name for move in moves for name in move.sources]
    known = {*moved, positions} if positions is not None else set(moved)
    missing, unknown = sorted(known - set(sources)), sorted(set(sources) - known)
    if missing or unknown:
        what = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which must not be there"
        raise PlanError(f"this {type(model).__name__} does not match its config: it {what}")
    devices = {parameter.device for parameter in sources.values()}
    if len(devices) > 1:
        raise PlanError(f"this {type(model).__name__} is on {len(devices)} devices; it needs one")


def _convert_tensors(move: Move, sources: dict[str, nn.Parameter], new: nn.Module) -> None:
    old = [sources[name] for name in move.sources]
    names = ", ".join(move.results)
    trained = {parameter.requires_grad for parameter in old}
    if len(trained) > 1:
        raise PlanError(f"{names}: only some of its sources are trained (requires_grad)")
    try:
        results = run_move(move, [parameter.detach() for parameter in old])
    except (ValueError, RuntimeError) as error:
        raise PlanError(f"{names}: {error}") from None
    for name, tensor in zip(move.results, results, strict=True):
        path, _, attribute = name.rpartition(".")
        module = new.get_submodule(path)
        shape = getattr(module, attribute).shape
        if tensor.shape != shape:
            raise PlanError(f"{name} would be {list(tensor.shape)}, but should be {list(shape)}")
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=trained.copy().pop()))


def _rebuild_buffers(new: PreTrainedModel, device: torch.device) -> None:
    """Build modules with buffers again: on the meta device their buffers have no values."""
    for path, module in list(new.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, name = path.rpartition(".")
            with torch.device(device):
                setattr(new.get_submodule(parent), name, type(module)(config=new.config))
