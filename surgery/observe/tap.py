"""The one place where the attention of a running model is observed.

Every attention block of transformers asks `AttentionInterface.get_interface` for the function to
call. While a tap is open, that method returns the same function followed by an observer. The
backend, its masks and its results stay the same to the bit. After closing, nothing remains.

Compiled code does not ask any more. So while a tap is open, compiled modules run uncompiled
(`torch.compiler.set_stance("force_eager")`), and compiled again afterwards. Flex attention is the
exception: without its compiler it would build the N×N map.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from surgery.errors import TapError
from surgery.models.sites.read import is_cross


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
        tokens: [B, T], token ids at the positions of the keys; None where they are unknown, as in
            cross-attention.
        cross: whether keys and values come from another sequence than the queries.
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
    tokens: torch.Tensor | None = None
    cross: bool = False


Observer = Callable[[AttentionCall], None]


class Tap:
    """Observes the attention of one model while it is open.

    It does not see other models that run at the same time, such as a teacher in distillation.

    Args:
        model: any model of transformers, or a module that holds one.
        observer: called after each attention call.
    """

    _open: list[Tap] = []  # noqa: RUF012  (shared on purpose: one method is replaced for all)
    _untapped: Callable[..., Callable[..., Any]] | None = None
    _stance = ExitStack()

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self.model_class = type(model).__name__
        self.observer = observer
        self.calls = 0
        self._calls_before = 0
        self.query_mask: torch.Tensor | None = None
        self.decoder_mask: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.decoder_tokens: torch.Tensor | None = None
        config = getattr(model, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._model = model

    def open(
        self,
        query_mask: torch.Tensor | None = None,
        decoder_mask: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        decoder_tokens: torch.Tensor | None = None,
    ) -> None:
        """Start observing.

        Args:
            query_mask: [B, N], which queries of the next batch are real; ``None``: all.
            decoder_mask: the same for the decoder of an encoder-decoder, which has other queries.
            tokens, decoder_tokens: [B, T], token ids of the next batch, including those in a cache.
        """
        self.query_mask, self.decoder_mask = query_mask, decoder_mask
        self.tokens, self.decoder_tokens = tokens, decoder_tokens
        if self in Tap._open:
            return
        self._calls_before = self.calls
        if not Tap._open:
            Tap._untapped = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_tapped  # type: ignore[method-assign, assignment]
            if "torch._dynamo" in sys.modules and not _uses_flex(self._model):
                Tap._stance.enter_context(torch.compiler.set_stance("force_eager"))
        Tap._open.append(self)

    def close(self) -> None:
        """Stop observing. Does nothing if the tap is already closed."""
        if self not in Tap._open:
            return
        Tap._open.remove(self)
        self.query_mask = self.decoder_mask = self.tokens = self.decoder_tokens = None
        if not Tap._open:
            AttentionInterface.get_interface = Tap._untapped  # type: ignore[method-assign, assignment]
            Tap._untapped = None
            Tap._stance.close()

    def __enter__(self) -> Tap:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require_calls(self) -> None:
        """Check that the tap has seen some attention since it was opened.

        Raises:
            TapError: it has seen none.
        """
        if self.calls == self._calls_before:
            raise TapError(
                f"the tap on {self.model_class} was never called: the model's attention does not "
                "use transformers' AttentionInterface, or its compiled code bypasses it"
            )

    def _take(self, module: nn.Module, implementation: str, arguments: _Arguments) -> None:
        path = self._paths.get(id(module))
        if path is None:
            return
        self.calls += 1
        query, key, value, mask, options, output = arguments
        in_decoder = self._encoder_decoder and getattr(module, "is_decoder", False)
        cross = is_cross(module, path)
        tokens = self.decoder_tokens if in_decoder else self.tokens
        self.observer(
            AttentionCall(
                path,
                module,
                implementation,
                query,
                key,
                value,
                mask,
                options,
                output,
                self.decoder_mask if in_decoder else self.query_mask,
                None if cross else tokens,
                cross,
            )
        )


def runs_in_backward() -> bool:
    """Whether this thread is inside a backward pass.

    Gradient checkpointing runs attention once more there, through the same code as in the forward
    pass.
    """
    return torch._C._current_graph_task_id() != -1


def _uses_flex(model: nn.Module) -> bool:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return any("flex" in str(getattr(c, "_attn_implementation", "")) for c in configs.values())


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
                module,
                implementation or "eager",
                (query, key, value, attention_mask, options, result[0]),
            )
        return result

    return tapped
