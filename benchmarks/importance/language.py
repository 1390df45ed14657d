"""Language models: scored by label loss on training text, measured on held-out text, distilled."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.importance.presets import Preset
from benchmarks.shared import settings
from benchmarks.shared.heal import heal
from surgery.data.collate import Batch
from surgery.data.module import TextData
from surgery.importance import ScoreTable
from surgery.importance.estimate import score_heads
from surgery.models.packed import make_inputs
from surgery.models.source import ModelSource


class LanguageModel:
    """See `benchmarks.importance.subject.Subject`."""

    def __init__(self, path: str, preset: Preset) -> None:
        self.path, self.preset = path, preset
        run = settings.run_config(path, preset, seed=0)
        self.original: PreTrainedModel = ModelSource(run.model).load().requires_grad_(False).eval()
        self._data: dict[int, TextData] = {}
        self._held_out = [dict(batch) for batch in settings.held_out(self._text(0), preset)]
        self._log_q: list[torch.Tensor] | None = None

    def windows(self, seed: int) -> list[Batch]:
        preset = self.preset
        return self._text(seed).draw_importance_batches(preset.score_windows, preset.batch_size)

    def score(self, estimator: str, unit: str, seed: int) -> ScoreTable:
        batches = self.windows(seed)
        return score_heads(self.original, batches, estimator, units=(unit,), seed=seed)

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """loss: nats per token. kl: KL(original || model), nats per token."""
        model.eval()
        if self._log_q is None:  # the same text for every cell, so the original sees it once
            self._log_q = [_log_probabilities(self.original, batch) for batch in self._held_out]
        nll = kl = count = 0.0
        for batch, log_q in zip(self._held_out, self._log_q, strict=True):
            log_p = log_q if model is self.original else _log_probabilities(model, batch)
            labels = batch["labels"][:, 1:].flatten()
            nll += float(F.nll_loss(log_p, labels, reduction="sum"))
            kl += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
            count += len(labels)
        return {"loss": nll / count, "kl": kl / count}

    def heal(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        preset = self.preset
        run = settings.run_config(
            self.path,
            preset,
            seed,
            objective="distill",
            steps=preset.healing_steps,
            rate=preset.healing_rate,
        )
        run.trainer["accelerator"] = "cpu"
        return heal(model.requires_grad_(True), self.original, run, self._text(seed))

    def _text(self, seed: int) -> TextData:
        if seed not in self._data:
            self._data[seed] = settings.text(settings.run_config(self.path, self.preset, seed))
        return self._data[seed]


def _log_probabilities(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[tokens, vocabulary], of every token that is predicted; whole windows without padding."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**make_inputs(model, inputs)).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)
