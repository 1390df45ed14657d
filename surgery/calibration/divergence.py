"""How far a changed model's predictions are from the original's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from surgery.calibration.folds import find_real_positions
from surgery.calibration.stream import Stream
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.importance.losses import compute_divergences
from surgery.models.packed import make_inputs

# Bytes of predictions that are kept; those of further batches are computed each time.
KEPT = 2**30


def predicts(model: PreTrainedModel, batch: Batch) -> bool:
    """Tell whether the model returns logits, which a divergence compares."""
    with torch.no_grad():
        return hasattr(_run(model, batch, {}), "logits")


def predict(
    model: PreTrainedModel, batch: Batch, parameters: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Compute the logits of a batch, [B, N, V] or [B, C], in at least fp32.

    Args:
        parameters: name → tensor that is used instead of the model's own.
    """
    logits: torch.Tensor = _run(model, batch, parameters or {}).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def refuse_no_numbers(model: PreTrainedModel, divergence: float) -> None:
    """Raises: ConfigError, a divergence is not a number, since predictions are none."""
    if not math.isfinite(divergence):
        raise ConfigError(
            "data",
            f"what {type(model).__name__} predicts on the calibration text is not all numbers",
            valid="text and weights that it makes finite predictions of",
        )


class Divergence:
    """Mean KL(original || changed) in nats over the real positions of the first batches.

    Args:
        original: still before its first layer; what it predicts is computed now.
        count: number of batches.
    """

    @torch.no_grad()
    def __init__(self, original: Stream, count: int) -> None:
        self.original, self.count = original, min(count, len(original.batches))
        self._kept: list[torch.Tensor] = []
        size = 0
        for number in range(self.count):
            found = self._predict(original, number)
            size += found.numel() * found.element_size()
            if size > KEPT:
                break
            self._kept.append(found)

    @torch.no_grad()
    def measure(self, changed: Stream) -> float:
        """Measure a copy of the original that is changed no lower than where its stream is.

        Raises:
            ConfigError: what one of the two predicts is not all numbers.
        """
        total, count = 0.0, 0
        for number in range(self.count):
            log_p = self._get(number)
            kl = compute_divergences(self._compute_logits(changed, number), log_p)
            mask = find_real_positions(changed.model, changed.batches[number])
            if mask is not None and mask.shape == kl.shape:
                kl = kl[mask.to(kl.device).bool()]
            total += float(kl.sum())
            count += kl.numel()
        refuse_no_numbers(changed.model, total)
        return total / max(1, count)

    @torch.no_grad()
    def measure_entropy(self) -> float:
        """Measure the mean entropy of what the original predicts, in nats: its expected loss on
        labels that are drawn from itself."""
        total, count = 0.0, 0
        for number in range(self.count):
            log_p = self._get(number)
            entropy = torch.special.entr(log_p.exp()).sum(-1)
            mask = find_real_positions(self.original.model, self.original.batches[number])
            if mask is not None and mask.shape == entropy.shape:
                entropy = entropy[mask.to(entropy.device).bool()]
            total, count = total + float(entropy.sum()), count + entropy.numel()
        return total / max(1, count)

    def _get(self, number: int) -> torch.Tensor:
        """Get what the original predicts, kept or computed."""
        return (
            self._kept[number] if number < len(self._kept) else self._predict(self.original, number)
        )

    def _predict(self, stream: Stream, number: int) -> torch.Tensor:
        return self._compute_logits(stream, number).log_softmax(-1)

    def _compute_logits(self, stream: Stream, number: int) -> torch.Tensor:
        with stream.resume(number) as batch:
            return predict(stream.model, batch)


def _run(model: PreTrainedModel, batch: Batch, parameters: dict[str, torch.Tensor]) -> Any:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return functional_call(model, parameters, (), dict(make_inputs(model, inputs)))
