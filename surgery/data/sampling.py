"""Sample windows of text from a causal language model, side by side, with its cache.

transformers' `generate` ends a row with its first document, and the rest would be padding. Here
every row is filled: after a document another one begins, which does not see those before it. Rows
go on together, one token at a time, so nothing is padded and the cost is known before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.data.openings import Openings
from surgery.errors import ConfigError
from surgery.models.forward import evaluating, find_device, get_cache


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it.
        top_p: of the probability, the share that the tokens which may be chosen have together.
        greedy_tokens: first tokens of a document that are the likeliest ones.
        ends: tokens that end a document, or what a user says.
    """

    temperature: float
    top_p: float
    greedy_tokens: int
    ends: frozenset[int]


@dataclass
class _Row:
    """One row: where its document began, and what is yet to be put in before the model goes on."""

    openings: Openings
    sampling: Sampling
    random: Random
    start: int = 0
    sampled: int = 0
    asked: bool = False
    over: bool = True
    queue: list[int] = field(default_factory=list)

    @property
    def is_greedy(self) -> bool:
        return self.sampled < self.sampling.greedy_tokens

    def choose_token(self, place: int, drawn: int) -> int:
        """Return the token at this place: the one that the model has drawn, or what must be."""
        if self.over:
            self.start, self.sampled, self.asked, self.over = place, 0, False, False
            self.queue = self.openings.draw(self.random)
        if self.queue:
            return self.queue.pop(0)
        self.sampled += 1
        if drawn not in self.sampling.ends:
            return drawn
        if not self.openings.answer or self.asked:
            self.over = True
            return drawn
        self.asked = True
        self.queue = list(self.openings.answer)  # which ends the user's part as the template does
        return self.queue.pop(0)


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    openings: Openings,
    sampling: Sampling,
    *,
    rows: int,
    length: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample token ids; the same seed gives the same ones on the same machine.

    Args:
        rows: sampled side by side.
        length: tokens per row.
        advance: called after each token of the rows.

    Returns:
        Token ids and their positions in their documents: each [rows, length], int32, on the CPU.

    Raises:
        ConfigError: the model computes something that is no probability.
    """
    device = find_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    state = [_Row(openings, sampling, Random(f"{seed} {row}")) for row in range(rows)]
    ids = torch.zeros(rows, length, dtype=torch.int32)
    positions = torch.zeros(rows, length, dtype=torch.int32)
    drawn: list[int] = [0] * rows
    cache = None
    with evaluating(model):
        for place in range(length):
            ids[:, place] = torch.tensor(
                [row.choose_token(place, token) for row, token in zip(state, drawn, strict=True)]
            )
            starts = torch.tensor([row.start for row in state])
            positions[:, place] = place - starts
            if place + 1 < length:
                logits, cache = _run(model, ids[:, : place + 1], starts, cache)
                greedy = torch.tensor([row.is_greedy for row in state], device=device)
                drawn = _draw(logits, greedy, sampling, generator)
            advance()
    return ids, positions


def _run(
    model: PreTrainedModel,
    ids: torch.Tensor,
    starts: torch.Tensor,
    cache: dict[str, Any] | None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run the last tokens, or all where the model keeps no cache.

    What stands before a document is hidden as the padding before a prompt is.

    Args:
        ids: [rows, tokens], all so far.
        starts: [rows], where the present document of each row begins.

    Returns:
        Logits of the next tokens [rows, vocabulary], and the cache.
    """
    device = find_device(model)
    places = torch.arange(ids.shape[1])
    inputs: dict[str, Any] = dict(cache or {})
    new = slice(-1, None) if inputs else slice(None)
    if bool(starts.any()):
        positions = (places - starts[:, None]).clamp(min=0)
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = positions[:, new].to(device)
        inputs["attention_mask"] = (places >= starts[:, None]).long().to(device)
    output = model(input_ids=ids[:, new].long().to(device), use_cache=True, **inputs)
    return output.logits[:, -1], get_cache(model, output)


def _draw(
    logits: torch.Tensor, greedy: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    logits = logits.float() / sampling.temperature
    probabilities = torch.softmax(logits, dim=-1)
    if not torch.isfinite(probabilities).all():
        raise ConfigError(
            "model.path",
            "cannot be sampled from: its logits are not all numbers",
            valid="data=text",
        )
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # The likeliest token always stays, and the one that reaches the share.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    chosen: list[int] = torch.where(greedy, logits.argmax(dim=-1), drawn).tolist()
    return chosen
