"""The one place where a running model's attention is observed.

Every attention block of transformers asks `AttentionInterface.get_interface` for the function to
call. While a tap is open that method hands out the same function with an observer behind it: the
backend, its masks and its results stay what they are, to the bit. Closed, nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from surgery.errors import TapError


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, as transformers made it.

    Attributes:
        site: module path of the attention block.
        module: the block itself.
        implementation: eager, sdpa, flash_attention_2, …
        query: [B, Hq, N, D], after QK-norm and RoPE.
        key, value: [B, Hkv, S, D], after the cache update, not repeated.
        mask: what the implementation takes: None, bool or float [B, 1 or Hq, N, S],
            [B, S] (flash) or a BlockMask (flex).
        options: keyword arguments: scaling, dropout, softcap, sliding_window, …
        output: [B, N, Hq, D], the input of the output projection.
        query_mask: [B, N], which queries are real; None: all.
    """

    site: str
    module: nn.Module
    implementation: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    options: Mapping[str, Any]
    output: torch.Tensor
    query_mask: torch.Tensor | None


Observer = Callable[[AttentionCall], None]


class Tap:
    """Observes the attention of one model while it is open.

    Other models, the teacher of a distillation for one, are not seen even if they run meanwhile.

    Args:
        model: any model of transformers, or a module that holds one.
        observer: called after each attention call.
    """

    _open: list[Tap] = []  # noqa: RUF012  (shared on purpose: one method is replaced for all)
    _untapped: Callable[..., Callable[..., Any]] | None = None

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self.model_class = type(model).__name__
        self.observer = observer
        self.calls = 0
        self._calls_before = 0
        self.query_mask: torch.Tensor | None = None
        self.decoder_mask: torch.Tensor | None = None
        config = getattr(model, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._paths = {id(module): path for path, module in model.named_modules()}

    def open(
        self, query_mask: torch.Tensor | None = None, decoder_mask: torch.Tensor | None = None
    ) -> None:
        """Start observing.

        Args:
            query_mask: [B, N], which queries of the next batch are real; ``None``: all.
            decoder_mask: the same for the decoder of an encoder-decoder, whose queries are others.
        """
        self.query_mask, self.decoder_mask = query_mask, decoder_mask
        if self in Tap._open:
            return
        self._calls_before = self.calls
        if not Tap._open:
            Tap._untapped = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_tapped  # type: ignore[method-assign, assignment]
        Tap._open.append(self)

    def close(self) -> None:
        """Stop observing. Harmless when closed already."""
        if self not in Tap._open:
            return
        Tap._open.remove(self)
        self.query_mask = self.decoder_mask = None
        if not Tap._open:
            AttentionInterface.get_interface = Tap._untapped  # type: ignore[method-assign, assignment]
            Tap._untapped = None

    def __enter__(self) -> Tap:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require_calls(self) -> None:
        """Refuse to go on blind.

        Raises:
            TapError: the model ran, and none of its attention came by since the tap was opened.
        """
        if self.calls == self._calls_before:
            raise TapError(
                f"the tap on {self.model_class} was never called: its attention does not go "
                "through transformers' AttentionInterface, or was compiled past it, so its heads "
                "cannot be watched; set callbacks.head_importance=null and "
                "callbacks.attention_entropy=null"
            )

    def _take(self, module: nn.Module, implementation: str, arguments: _Arguments) -> None:
        path = self._paths.get(id(module))
        if path is None:
            return
        self.calls += 1
        query, key, value, mask, options, output = arguments
        in_decoder = self._encoder_decoder and getattr(module, "is_decoder", False)
        self.observer(
            AttentionCall(
                path, module, implementation, query, key, value, mask, options, output,
                self.decoder_mask if in_decoder else self.query_mask,
            )
        )  # fmt: skip


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, Mapping[str, Any], torch.Tensor]


def _get_tapped(
    interface: AttentionInterface, implementation: str, default: Callable[..., Any]
) -> Callable[..., Any]:
    assert Tap._untapped is not None
    attention = Tap._untapped(interface, implementation, default)

    def tapped(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        result = attention(module, query, key, value, attention_mask, *args, **options)
        for tap in list(Tap._open):
            tap._take(
                module, implementation or "eager",
                (query, key, value, attention_mask, options, result[0]),
            )  # fmt: skip
        return result

    return tapped
