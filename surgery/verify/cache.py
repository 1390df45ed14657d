"""How many heads a model's own cache keeps: some architectures repeat KV heads before that."""

from __future__ import annotations

from contextlib import suppress

import torch
from transformers import PreTrainedModel

from surgery.models.copies import make_meta_copy
from surgery.models.probe import make_probe_inputs
from surgery.verify.equivalence import FAULTS


def list_cached_heads(model: PreTrainedModel) -> list[int]:
    """List the heads of the keys that each layer of the cache holds after a run on a meta copy.

    Empty for a model that does not run there, or returns no cache.
    """
    copied = make_meta_copy(model)
    heads: list[int] = []
    with suppress(*FAULTS), torch.no_grad():
        cache = copied(**{**make_probe_inputs(copied), "use_cache": True}).past_key_values
        cache = getattr(cache, "self_attention_cache", cache)
        heads = [layer.keys.shape[1] for layer in cache.layers if layer.keys is not None]
    return heads
