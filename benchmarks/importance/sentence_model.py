"""A sentence encoder: judged by how far its embeddings move, healed towards the original's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.importance.docstrings import sentences
from benchmarks.importance.presets import Preset
from benchmarks.shared.schedule import DivergedError
from benchmarks.shared.settings import warmup_steps
from surgery.config.schema import Task
from surgery.data.collate import Batch
from surgery.importance import ScoreTable
from surgery.importance.estimate import score_heads


class SentenceModel:
    """See `benchmarks.importance.subject.Subject`."""

    def __init__(self, path: str, preset: Preset) -> None:
        self.preset = preset
        self.original: PreTrainedModel = AutoModel.from_pretrained(path).requires_grad_(False)
        self.original.eval()
        self._judged = JudgedBert.from_pretrained(path).requires_grad_(False).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._learnt, held_out = sentences()
        drawn = _order(len(held_out), seed=0)[: preset.held_out_sentences]
        self._held_out = self._batches([held_out[number] for number in drawn])
        # Seed → batches, and the original's embeddings of them.
        self._looked_at: dict[int, list[tuple[Batch, torch.Tensor]]] = {}
        self._targets = [self._embeddings(batch) for batch in self._held_out]

    def windows(self, seed: int) -> list[Batch]:
        if seed not in self._looked_at:
            batches = self._batches(self._drawn(seed, self.preset.score_sentences))
            self._looked_at[seed] = [(batch, self._embeddings(batch)) for batch in batches]
        return [batch for batch, _ in self._looked_at[seed]]

    def score(self, estimator: str, unit: str, seed: int) -> ScoreTable:
        """leave_one_out: by 1 - cosine to the original's embedding. gate_gradient: by the
        embedding's component in a direction drawn for each sentence, since the distance of a model
        to itself has no gradient; see `JudgedBert`.
        """
        self.windows(seed)
        generator = torch.Generator().manual_seed(seed)
        batches: list[Batch] = []
        for batch, target in self._looked_at[seed]:
            judged = {**batch, "labels": torch.zeros(len(target), dtype=torch.long)}
            if estimator == "gate_gradient":
                drawn = torch.randn(target.shape, generator=generator)
                judged["probe"] = F.normalize(drawn, dim=-1)
            elif estimator == "leave_one_out":
                judged["target"] = target
            batches.append(judged)
        return score_heads(
            self._judged,
            batches,
            estimator,
            units=(unit,),
            seed=seed,
            task=Task.sequence_classification,
        )

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """loss: 1 - cosine to the original's embedding, a mean over sentences."""
        model.eval()
        lost = [
            cosine_loss(embedding(model, batch), target)
            for batch, target in zip(self._held_out, self._targets, strict=True)
        ]
        return {"loss": float(torch.cat(lost).double().mean())}

    def heal(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """Mean squared error of every real token's last hidden state, AdamW, fp32."""
        preset = self.preset
        model.requires_grad_(True).eval()  # its dropout would be noise on so few steps
        optimizer = torch.optim.AdamW(model.parameters(), lr=preset.sentence_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_at(step, preset.healing_steps)
        )
        for batch in self._healing(seed):
            with torch.no_grad():
                target = self.original(**batch).last_hidden_state
            error = (model(**batch).last_hidden_state - target).square().mean(-1)
            mask = batch["attention_mask"]
            loss = (error * mask).sum() / mask.sum()
            if not torch.isfinite(loss):
                raise DivergedError(f"the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.requires_grad_(False)

    def _healing(self, seed: int) -> Iterator[Batch]:
        """Those that estimators looked at first."""
        size = self.preset.sentence_batch
        return iter(self._batches(self._drawn(seed, size * self.preset.healing_steps)))

    def _drawn(self, seed: int, count: int) -> list[str]:
        return [self._learnt[number] for number in _order(len(self._learnt), seed)[:count]]

    def _batches(self, texts: Sequence[str]) -> list[Batch]:
        size, found = self.preset.sentence_batch, []
        for start in range(0, len(texts), size):
            found.append(
                self._tokenizer(
                    texts[start : start + size],
                    padding=True,
                    truncation=True,
                    max_length=self.preset.sentence_tokens,
                    return_tensors="pt",
                ).data
            )
        return found

    @torch.inference_mode()
    def _embeddings(self, batch: Batch) -> torch.Tensor:
        return embedding(self.original, batch).clone()


class JudgedBert(BertModel):
    """A BERT whose label loss is a loss of its embedding: the estimators know no other.

    Two classes, of which label 0 has probability exp(-loss). With `target` [B, D], normalised, the
    loss is 1 - cosine. With `probe` [B, D], directions of length 1, it is 2 + probe . embedding:
    near the model as it is 1 - cosine is (1/2) |J dg|^2 for a change dg of the gates, J the
    embedding's derivative, and a random direction's derivative measures the length of J's columns.
    """

    def forward(
        self,
        target: torch.Tensor | None = None,
        probe: torch.Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        hidden = super().forward(**inputs).last_hidden_state
        found = pooled(hidden, inputs["attention_mask"])
        if target is not None:
            loss = cosine_loss(found, target)
        elif probe is not None:
            loss = 2 + (found * probe).sum(-1)
        else:  # nobody asks for the loss
            loss = found.sum(-1) * 0 + 1
        return SequenceClassifierOutput(
            logits=torch.stack([-loss, torch.log1p(-torch.exp(-loss))], -1)
        )


def embedding(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[B, D], of length 1."""
    return pooled(model(**batch).last_hidden_state, batch["attention_mask"])


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, normalised: [B, N, D] and [B, N] to [B, D]."""
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def cosine_loss(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cosine of vectors of length 1: twice [B, D] to [B]. Exact near 0, unlike the cosine."""
    return (found - target).square().sum(-1) / 2


def rate_at(step: int, steps: int) -> float:
    """Share of the rate: linear warm-up, then cosine to 5%, as the project's own schedule."""
    warm = warmup_steps(steps)
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2


def _order(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()
