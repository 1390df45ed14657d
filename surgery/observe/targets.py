"""Keys that a query may look for: the first key, the key before, an earlier same token.

A target counts where the row sees it. It may be hidden: outside the sliding window, in another
packed document, or in padding. Such a row says nothing about the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.observe.masks import EVERY, sees_previous
from surgery.observe.tap import AttentionCall

COLUMNS = ("first_token", "previous_token", "own_token")
SETS = ("same_token", "induction")


@dataclass(frozen=True)
class Targets:
    """The keys that the rows may look for; empty where they are unknown.

    Attributes:
        columns: name → (index of the key, whether the row sees it), each [1 or b, 1 or Hq, R].
        sets: name → keys [b, R, S], bool; the row looks for any of them.
        distance: |i - j| in tokens, [1 or b, R, S].
    """

    columns: dict[str, tuple[torch.Tensor, torch.Tensor]]
    sets: dict[str, torch.Tensor]
    distance: torch.Tensor | None


def find_targets(
    call: AttentionCall, rows: torch.Tensor, visible: torch.Tensor, examples: slice = EVERY
) -> Targets:
    """Find the targets of query rows `rows` [R].

    Args:
        visible: [1 or b, 1 or Hq, R, S], the keys that the rows see.
    """
    first = visible.byte().argmax(-1)
    if call.cross:
        return Targets({"first_token": (first, visible.any(-1))}, {}, None)
    continues = sees_previous(call, examples)
    position = _find_positions(call, rows, visible)
    before = (position - 1).clamp_min(0)
    columns = {
        "first_token": (first, _is_beginning(call, first, position, continues) & visible.any(-1)),
        "previous_token": (before, _look_up(visible, before) & (position > 0)),
        "own_token": (position, _look_up(visible, position)),
    }
    place = position[:, 0]
    key = torch.arange(visible.shape[-1], device=rows.device)
    distance = (place[..., None] - key).abs_()
    tokens = call.tokens
    if tokens is None or tokens.shape != (call.query.shape[0], len(key)):
        return Targets(columns, {}, distance)
    tokens = tokens.to(rows.device)[examples]
    own = tokens.gather(1, place.expand(len(tokens), -1))
    earlier = key < place[..., None]
    same = (tokens[:, None, :] == own[..., None]) & earlier
    after = torch.zeros_like(same)
    after[..., 1:] = same[..., :-1]
    seen = visible[:, 0] & earlier
    if continues is not None:  # the key after a document's last token belongs to the next one
        after &= continues[:, None, :]
    return Targets(columns, {"same_token": same & seen, "induction": after & seen}, distance)


def _find_positions(call: AttentionCall, rows: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Find the key of each query's own token: [1 or b, 1 or Hq, R]."""
    keys = visible.shape[-1]
    if call.query.shape[2] == keys:
        return rows.view(1, 1, -1)
    # With a cache, attention is causal. The cache may have room for later keys.
    return keys - 1 - visible.flip(-1).byte().argmax(-1)


def _is_beginning(
    call: AttentionCall, first: torch.Tensor, position: torch.Tensor, continues: torch.Tensor | None
) -> torch.Tensor:
    """Whether the first visible key is the beginning of a text, and not only of a window."""
    if continues is not None:
        return ~_look_up(continues[:, None, None], first)
    window = call.options.get("sliding_window")
    seen = position - first + 1
    return seen < window if window is not None else torch.ones_like(seen, dtype=torch.bool)


def _look_up(visible: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(visible.shape[:-1], index.shape)
    return visible.expand(*shape, -1).gather(-1, index.expand(shape)[..., None])[..., 0]
