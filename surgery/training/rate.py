"""The learning rate of healing, where `optim.lr` leaves it open: by what surgery cost the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError
from surgery.models.sites import get_text_config

# Times 1 / hidden_size: the width rule of Yang et al. 2022 (arXiv:2203.03466) for Adam. With this
# constant, healing the embedded model worked best, after it had lost 2.5 times its loss.
FULL_RATE = 0.75
# The tokens of a step that this was found with. Of fewer, the gradient is noisier, and the rate
# falls with the square root: the rule of Malladi et al. 2022 (arXiv:2205.10287) for Adam.
_FULL_TOKENS = 4096
# Shares of the full rate: the least, and the middle of both ends on a logarithmic scale, for models
# of which it is not known what they lost.
LEAST_SHARE, MIDDLE_SHARE = 0.2, 0.45
# A loss below this (nats) counts as this much: a classifier that is always right has lost no
# infinite part of its loss.
_LEAST_LOSS = 1.0


@dataclass(frozen=True)
class Rate:
    """A peak learning rate, and why it is that.

    Attributes:
        share: of `compute_full_rate`; ``None`` if it was not derived from that.
        reason: a clause, for a sentence.
    """

    value: float
    share: float | None
    reason: str


def compute_full_rate(config: Any) -> float:
    """Compute the rate for a model that lost everything, or has learnt nothing yet.

    Raises:
        ConfigError: the config has no hidden_size.
    """
    width = getattr(get_text_config(config), "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            "optim.lr",
            "a value is required: the model's config has no hidden_size to derive it from",
        )
    return FULL_RATE / width


def compute_batch_share(tokens: int) -> float:
    """Compute the share of the full rate that the tokens of one optimizer step allow."""
    return min(1.0, math.sqrt(tokens / _FULL_TOKENS))


def compute_loss_share(original: float, now: float) -> float:
    """Compute the share of the full rate for a model that lost this much.

    It is the square root of what the loss rose by, as a part of the original's, and at least
    `LEAST_SHARE`; docs/healing.md has the measurements that this goes back to.

    Args:
        original, now: held-out losses on the same windows, in nats per token.
    """
    lost = (now - original) / max(original, _LEAST_LOSS)
    if not math.isfinite(lost):
        return MIDDLE_SHARE
    return min(1.0, max(LEAST_SHARE, math.sqrt(max(0.0, lost))))
