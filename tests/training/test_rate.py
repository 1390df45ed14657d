"""The learning rate that follows from what surgery cost."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from surgery.errors import ConfigError
from surgery.training.rate import (
    LEAST_SHARE,
    MIDDLE_SHARE,
    compute_batch_share,
    compute_full_rate,
    compute_loss_share,
)

# docs/healing.md: the original's loss, what surgery left, tokens of a step; of the shares that were
# tried, those after which less was lost than at all others, or about as little.
MEASURED = {
    "Llama, mean": (0.995, 3.444, 4096, (0.5, 2.0)),
    "GPT-2, mean": (1.291, 3.124, 4096, (0.5, 2.0)),
    "Qwen3, mean": (1.155, 2.919, 4096, (0.5, 1.0)),
    "Llama, optimal": (0.995, 1.068, 4096, (0.2, 0.5)),
    "Qwen3, optimal": (1.155, 1.223, 4096, (0.1, 0.5)),
    "GPT-2, optimal": (1.291, 1.307, 4096, (0.1, 0.2)),
    "SmolLM2, optimal": (2.158, 2.821, 1024, (0.07, 0.3)),
}


@pytest.mark.parametrize("model", MEASURED)
def test_the_rule_is_among_what_healed_best(model: str) -> None:
    original, now, tokens, (low, high) = MEASURED[model]
    share = compute_loss_share(original, now) * compute_batch_share(tokens)
    assert low <= share <= high


def test_more_loss_is_a_higher_rate_between_two_ends() -> None:
    lost = [0.0, 0.01, 0.04, 0.1, 0.5, 0.9, 1.0, 3.0]
    shares = [compute_loss_share(2.0, 2.0 * (1 + part)) for part in lost]
    assert shares == sorted(shares)
    assert shares[3] == pytest.approx(math.sqrt(0.1))
    assert (shares[0], shares[-1]) == (LEAST_SHARE, 1.0)
    assert compute_loss_share(2.0, 1.5) == LEAST_SHARE  # surgery made it better
    # What is lost of next to nothing is no infinite part of it.
    assert compute_loss_share(0.001, 0.011) == LEAST_SHARE
    assert compute_loss_share(2.0, float("nan")) == MIDDLE_SHARE


def test_fewer_tokens_are_a_lower_rate() -> None:
    assert [compute_batch_share(n) for n in (256, 1024, 4096, 10**6)] == [0.25, 0.5, 1.0, 1.0]


def test_the_width_decides_the_full_rate() -> None:
    assert compute_full_rate(LlamaConfig(hidden_size=256)) == 0.75 / 256
    with pytest.raises(ConfigError, match=r"optim\.lr: a value is required"):
        compute_full_rate(SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
