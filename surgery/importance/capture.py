"""Run a model once and keep what is needed to resume it from the middle of any layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.importance.work import compute_logits
from surgery.models.sites import Site
from surgery.models.stack import NotResumable, Stack


@dataclass
class LayerTrace:
    """What the modules of one layer returned.

    Attributes:
        output: what the layer returned.
        attended: what the attention block returned; ``None`` for a layer without a site.
        inputs: [B, N, Hq * unit], the input of the site's output projection.
        projected: [B, N, D_model], the output of the site's output projection.
        earlier: what those modules of the layer returned that ran before the attention block.
    """

    output: Any = None
    attended: Any = None
    inputs: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    earlier: dict[nn.Module, Any] = field(default_factory=dict)


def capture(
    model: PreTrainedModel, stack: Stack, sites: Sequence[Site], batch: Batch
) -> tuple[torch.Tensor, list[LayerTrace]]:
    """Run `batch`; return its logits, and a trace for each layer.

    Raises:
        NotResumable: the layers do not each run once, in order.
    """
    traces = [LayerTrace() for _ in stack.layers]
    order: list[int] = []
    with ExitStack() as hooks:

        def call_after(module: nn.Module, function: Callable[[Any, Any], None]) -> None:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                function((args, kwargs), output)

            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        for number, layer in enumerate(stack.layers):

            def keep_output(_: Any, output: Any, number: int = number) -> None:
                order.append(number)
                traces[number].output = output

            call_after(layer, keep_output)
        for number, site in zip(stack.index, sites, strict=True):
            _record_site(call_after, model, stack.layers[number], site, traces[number])
        logits = compute_logits(model, batch)
    if order != list(range(len(traces))):
        raise NotResumable("its layers do not each run once, in order")
    return logits, traces


def _record_site(
    call_after: Callable[[nn.Module, Callable[[Any, Any], None]], None],
    model: nn.Module,
    layer: nn.Module,
    site: Site,
    trace: LayerTrace,
) -> None:
    def keep_attended(_: Any, output: Any) -> None:
        trace.attended = output

    def keep_projected(arguments: Any, output: torch.Tensor) -> None:
        args, kwargs = arguments
        trace.inputs = args[0] if args else next(iter(kwargs.values()))
        trace.projected = output

    call_after(model.get_submodule(site.path), keep_attended)
    call_after(model.get_submodule(site.output.path), keep_projected)
    for child in layer.children():

        def keep_earlier(_: Any, output: Any, child: nn.Module = child) -> None:
            if trace.inputs is None and trace.attended is None:
                trace.earlier[child] = output

        call_after(child, keep_earlier)
