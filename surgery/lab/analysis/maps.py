"""Attention maps of chosen heads over chosen texts; nothing else is materialised."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.console import say
from surgery.data.windows import encode
from surgery.errors import ConfigError
from surgery.lab.analysis.pattern import pattern
from surgery.lab.analysis.watch import passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall

KEY = "analysis.maps"
BEST = "best"
# More tokens cannot be read on the axes.
LONGEST = 64
_NAME = re.compile(r"(\d+)\.(\d+)")
Head = tuple[int, int]


@dataclass(frozen=True)
class Map:
    """Attributes: head, as (layer, head); text, its number; tokens [N]; p [N, N] on the CPU."""

    head: Head
    text: int
    tokens: tuple[str, ...]
    p: torch.Tensor


def check_maps(heads: object, texts: Sequence[str]) -> None:
    """Raises: ConfigError, for what names no heads or no texts, or only one of them."""
    named = isinstance(heads, (list, tuple)) and all(_NAME.fullmatch(str(h)) for h in heads)
    if heads not in (None, BEST) and not named:
        raise ConfigError(
            f"{KEY}.heads",
            "is no list of heads",
            given=heads,
            valid=f'["2.3", …] (layer.head, from 0), {BEST}, or null',
        )
    if heads and not texts:
        raise ConfigError(f"{KEY}.texts", "a text is required here", valid='["…", …]')
    if texts and not heads:
        raise ConfigError(
            f"{KEY}.heads",
            "names no head for the texts",
            given=heads,
            valid=f'["2.3", …] or {BEST}',
        )
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{KEY}.texts", "holds no text", given=list(texts))


def check_heads(heads: object, sites: Sequence[Site]) -> None:
    """Raises: ConfigError, for a head that the model does not have."""
    if isinstance(heads, (list, tuple)):
        counts = {site.layer: site.q_heads for site in sites}
        for layer, head in parsed(heads):
            if head >= counts.get(layer, 0):
                valid = (
                    f"0 to {counts[layer] - 1} in layer {layer}"
                    if layer in counts
                    else (f"layers {min(counts)} to {max(counts)}")
                )
                raise ConfigError(
                    f"{KEY}.heads", "there is no such head", given=f"{layer}.{head}", valid=valid
                )


def parsed(heads: Sequence[object]) -> list[Head]:
    """``"2.3"`` → (2, 3)."""
    found = [_NAME.fullmatch(str(head)) for head in heads]
    return [(int(one[1]), int(one[2])) for one in found if one is not None]


def best_heads(roles: Mapping[Head, str], scores: Mapping[Head, float]) -> list[Head]:
    """Of each role the head with the highest score, in the order of the layers."""
    found: dict[str, Head] = {}
    for head, role in roles.items():
        if role not in found or scores[head] > scores[found[role]]:
            found[role] = head
    return sorted(found.values())


def attention_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[Site],
    heads: Sequence[Head],
    texts: Sequence[str],
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> list[Map]:
    """Maps of `heads` over each of `texts`; of a long text, its first `LONGEST` tokens.

    Args:
        frame: special tokens before and after.
    """
    before, after = frame
    found: list[Map] = []
    wanted = [site for site in sites if any(layer == site.layer for layer, _ in heads)]
    for number, text in enumerate(texts):
        inner = encode(tokenizer, [text])[0].tolist()
        room = max(1, LONGEST - len(before) - len(after))
        if len(inner) > room:
            say(f"  map of text {number + 1}: its first {room} of {len(inner)} tokens")
        ids = [*before, *inner[:room], *after]
        tokens = tuple(_shown(tokenizer, token) for token in ids)

        def seen(
            site: Site, call: AttentionCall, number: int = number, tokens: tuple[str, ...] = tokens
        ) -> None:
            p = pattern(call, torch.arange(len(tokens))).keys[0]
            for layer, head in heads:
                if layer == site.layer:
                    found.append(Map((layer, head), number, tokens, p[head].cpu()))

        batch = {"input_ids": torch.tensor([ids])}
        for _ in passes(model, [batch], wanted, seen, "analysis, maps"):
            pass
    return found


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.decode([token]))
    text = text if text.strip() or not text else text.replace(" ", "␣")
    return text.replace("\n", "↵").replace("\t", "⇥") or str(token)
