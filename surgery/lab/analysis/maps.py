"""Attention maps of selected heads over selected texts; no other map is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.console import say
from surgery.data.windows import encode
from surgery.errors import ConfigError
from surgery.lab.analysis.watch import compute_pattern, run_passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall

KEY = "analysis.maps"
BEST = "best"
# More tokens would be unreadable on the axes.
LONGEST = 64
_NAME = re.compile(r"(\d+)\.(\d+)")
Head = tuple[int, int]


@dataclass(frozen=True)
class Map:
    """The attention map of one head over one text.

    Attributes:
        head: (layer, head).
        text: number of the text.
        tokens: [N].
        p: [N, N], on the CPU.
    """

    head: Head
    text: int
    tokens: tuple[str, ...]
    p: torch.Tensor


def check_maps(heads: object, texts: Sequence[str]) -> None:
    """Check the options of maps.

    Raises:
        ConfigError: heads or texts are invalid, or only one of them is given.
    """
    named = isinstance(heads, (list, tuple)) and all(_NAME.fullmatch(str(h)) for h in heads)
    if heads not in (None, BEST) and not named:
        raise ConfigError(
            f"{KEY}.heads",
            "must be a list of heads",
            given=heads,
            valid=f'["2.3", …] (layer.head, from 0), {BEST}, or null',
        )
    if heads and not texts:
        raise ConfigError(f"{KEY}.texts", "a text is required here", valid='["…", …]')
    if texts and not heads:
        raise ConfigError(
            f"{KEY}.heads",
            "heads are required for the texts",
            given=heads,
            valid=f'["2.3", …] or {BEST}',
        )
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{KEY}.texts", "must be texts that are not empty", given=list(texts))


def check_heads(heads: object, sites: Sequence[Site]) -> None:
    """Check that the model has the heads.

    Raises:
        ConfigError: it does not have one of them.
    """
    if isinstance(heads, (list, tuple)):
        counts = {site.layer: site.q_heads for site in sites}
        for layer, head in parse_heads(heads):
            if head >= counts.get(layer, 0):
                valid = (
                    f"0 to {counts[layer] - 1} in layer {layer}"
                    if layer in counts
                    else (f"layers {min(counts)} to {max(counts)}")
                )
                raise ConfigError(
                    f"{KEY}.heads", "there is no such head", given=f"{layer}.{head}", valid=valid
                )


def parse_heads(heads: Sequence[object]) -> list[Head]:
    """Parse heads: ``"2.3"`` → (2, 3)."""
    matches = [_NAME.fullmatch(str(head)) for head in heads]
    return [(int(match[1]), int(match[2])) for match in matches if match is not None]


def pick_best_heads(roles: Mapping[Head, str], scores: Mapping[Head, float]) -> list[Head]:
    """Pick the head with the highest score of each role, in the order of the layers."""
    best: dict[str, Head] = {}
    for head, role in roles.items():
        if role not in best or scores[head] > scores[best[role]]:
            best[role] = head
    return sorted(best.values())


def compute_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[Site],
    heads: Sequence[Head],
    texts: Sequence[str],
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> list[Map]:
    """Compute the maps of `heads` over each text; of a long text, its first `LONGEST` tokens.

    Args:
        frame: special tokens before and after the text.
    """
    before, after = frame
    maps: list[Map] = []
    wanted = [site for site in sites if any(layer == site.layer for layer, _ in heads)]
    for number, text in enumerate(texts):
        inner = encode(tokenizer, [text])[0].tolist()
        room = max(1, LONGEST - len(before) - len(after))
        if len(inner) > room:
            say(f"  map of text {number + 1}: its first {room} of {len(inner)} tokens")
        ids = [*before, *inner[:room], *after]
        tokens = tuple(_format_token(tokenizer, token) for token in ids)

        def observe(
            site: Site, call: AttentionCall, number: int = number, tokens: tuple[str, ...] = tokens
        ) -> None:
            p = compute_pattern(call, torch.arange(len(tokens))).keys[0]
            for layer, head in heads:
                if layer == site.layer:
                    maps.append(Map((layer, head), number, tokens, p[head].cpu()))

        batch = {"input_ids": torch.tensor([ids])}
        for _ in run_passes(model, [batch], wanted, observe, "analysis, maps"):
            pass
    return maps


def _format_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.decode([token]))
    text = text if text.strip() or not text else text.replace(" ", "␣")
    return text.replace("\n", "↵").replace("\t", "⇥") or str(token)
