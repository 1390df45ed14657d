"""What is timed: a forward pass, a training step, cached decoding."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from surgery.models.sites import find_sites
from surgery.plan.sizes import count_kv_bytes

PREFILL_CHUNK = 512


class Forward:
    """Logits of the last position; no gradient, no cache."""

    unit = "ms"

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, decode_tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.per_call = 1

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(input_ids=self.tokens, use_cache=False, logits_to_keep=1)

    def reset(self) -> None:
        pass


class Train(Forward):
    """Loss over all positions and its gradients; no optimizer."""

    def __call__(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()

    def reset(self) -> None:
        self.model.zero_grad(set_to_none=True)


class Decode(Forward):
    """One token at a time after a prompt, with transformers' DynamicCache.

    The prompt is read in chunks and not timed, so that it fits where eager attention over all of
    it would not.
    """

    unit = "ms/token"

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, decode_tokens: int) -> None:
        super().__init__(model, tokens, decode_tokens)
        self.per_call = decode_tokens
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for chunk in tokens.split(PREFILL_CHUNK, dim=1):
                model(input_ids=chunk, past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> None:
        token = self.tokens[:, -1:]
        for _ in range(self.per_call):
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)

    def reset(self) -> None:
        self.cache.crop(self.tokens.shape[1] - self.cache.get_seq_length())


WORKLOADS: dict[str, type[Forward]] = {"forward": Forward, "train": Train, "decode": Decode}


def decode_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """What one decoded token has to read: every matrix but the embedding's, and the cache."""
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - embedding.numel()
    size = embedding.element_size()
    return weights * size + batch * count_kv_bytes(find_sites(model).sites, length, size)
