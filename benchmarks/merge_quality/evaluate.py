"""One model beside its original on the held-out windows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.models.packed import make_inputs
from surgery.observe import AttentionCall, Tap
from surgery.observe.rows import compute_row_entropy, compute_row_logits, sample_rows


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Iterable[Batch],
    entropy_rows: int,
) -> dict[str, float]:
    """Means over all predicted tokens, of whole windows without padding.

    Args:
        entropy_rows: query rows drawn per batch, the same ones for every model.

    Returns:
        loss: nats per token. kl: KL(original || model), nats per token. agreement: share of tokens
        whose likeliest value is the original's. entropy: of attention, nats, a mean over heads,
        layers, windows and drawn rows.
    """
    model.eval()
    entropy = _Entropy(entropy_rows)
    tap = Tap(model, entropy)
    sums = dict.fromkeys(("loss", "kl", "agreement"), 0.0)
    count = 0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:].flatten()
        entropy.next_batch()
        with tap:
            log_p = _log_probabilities(model, inputs)
        log_q = log_p if model is original else _log_probabilities(original, inputs)
        sums["loss"] += float(F.nll_loss(log_p, labels, reduction="sum"))
        sums["kl"] += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
        sums["agreement"] += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += len(labels)
    tap.require_calls()
    return {name: total / count for name, total in sums.items()} | {"entropy": entropy.mean}


def _log_probabilities(model: PreTrainedModel, inputs: Batch) -> torch.Tensor:
    """[tokens, vocabulary], of every token that is predicted."""
    logits = model(**make_inputs(model, inputs)).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)


class _Entropy:
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.batch = -1
        self.total, self.count = 0.0, 0

    def next_batch(self) -> None:
        self.batch += 1

    def __call__(self, call: AttentionCall) -> None:
        generator = torch.Generator().manual_seed(self.batch)
        rows = sample_rows(call.query.shape[2], self.rows, generator)
        entropy, _, _ = compute_row_entropy(compute_row_logits(call, rows))
        self.total += float(entropy.double().sum())
        self.count += entropy.numel()

    @property
    def mean(self) -> float:
        return self.total / self.count
