"""How far a changed model's predictions are from the original's."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

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
        return hasattr(_run(model, batch), "logits")


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
            if number < len(self._kept):
                log_p = self._kept[number]
            else:
                log_p = self._predict(self.original, number)
            kl = compute_divergences(self._compute_logits(changed, number), log_p)
            mask = self._get_mask(changed.batches[number])
            if mask is not None and mask.shape == kl.shape:
                kl = kl[mask.to(kl.device).bool()]
            total += float(kl.sum())
            count += kl.numel()
        if not math.isfinite(total):
            raise ConfigError(
                "data",
                f"what {type(changed.model).__name__} predicts on the calibration text is not all "
                "numbers",
                valid="text and weights that it makes finite predictions of",
            )
        return total / max(1, count)

    def _predict(self, stream: Stream, number: int) -> torch.Tensor:
        return self._compute_logits(stream, number).log_softmax(-1)

    def _compute_logits(self, stream: Stream, number: int) -> torch.Tensor:
        with stream.resume(number) as batch:
            logits: torch.Tensor = _run(stream.model, batch).logits
            return logits.float()

    def _get_mask(self, batch: Batch) -> torch.Tensor | None:
        decodes = self.original.model.config.is_encoder_decoder
        return batch.get("decoder_attention_mask" if decodes else "attention_mask")


def _run(model: PreTrainedModel, batch: Batch) -> Any:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return model(**make_inputs(model, inputs))
