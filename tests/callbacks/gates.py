"""The oracle of head importance: a gate multiplied onto each head, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.callbacks.fitting import Batch

OUTPUTS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gemma2": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
}
LAYERS = 2


@contextmanager
def gated(model: PreTrainedModel, gates: torch.Tensor) -> Iterator[None]:
    """Multiply gates [layer, example, head] onto the heads, at the output projections' inputs."""
    heads = gates.shape[-1]

    def hook(gate: torch.Tensor) -> object:
        def scale(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            by_head = inputs[0].unflatten(-1, (heads, -1))
            return ((by_head * gate[:, None, :, None]).flatten(-2),)

        return scale

    path = OUTPUTS[model.config.model_type]
    handles = [
        model.get_submodule(path.format(layer)).register_forward_pre_hook(hook(gates[layer]))
        for layer in range(LAYERS)
    ]
    yield
    for handle in handles:
        handle.remove()


def gate_gradients(model: PreTrainedModel, batch: Batch, heads: int) -> torch.Tensor:
    """[layer, example, head]: how the loss of the batch changes with each example's gates."""
    examples = batch["input_ids"].shape[0]
    gates = torch.ones(LAYERS, examples, heads, requires_grad=True)
    with gated(model, gates):
        loss = model(**batch).loss
    return torch.autograd.grad(loss, gates)[0]


def importance(model: PreTrainedModel, *batches: Batch, heads: int = 4) -> torch.Tensor:
    """[layer, head]: mean over all examples of the absolute gradient of their share of the loss."""
    each = [gate_gradients(model, batch, heads) * len(batch["input_ids"]) for batch in batches]
    return torch.cat(each, dim=1).abs().mean(1)
