"""What training went through, for the summary and the picture: losses and tokens."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

MOST_POINTS = 500


class LossCurve(Callback):
    """Keeps [step, loss] per optimizer step, thinned evenly once there are too many.

    Attributes:
        tokens: tokens trained on by this process, padding not counted.
    """

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.tokens = 0
        self._every = 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        mask = batch.get("attention_mask")
        self.tokens += int(batch["input_ids"].numel() if mask is None else mask.sum())
        step = trainer.global_step
        loss = trainer.callback_metrics.get("train/loss")
        if (
            loss is None
            or step == 0
            or step % self._every
            or (self.points and self.points[-1][0] == step)
        ):
            return
        self.points.append((step, float(loss)))
        if len(self.points) > MOST_POINTS:
            self._every *= 2
            self.points = [point for point in self.points if point[0] % self._every == 0]

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "every": self._every, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = [(int(step), float(loss)) for step, loss in state_dict["points"]]
        self._every = int(state_dict["every"])
        self.tokens = int(state_dict["tokens"])
