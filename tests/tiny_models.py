"""Small random models of many architectures, the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

VOCAB = 64

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FIELDS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen3": _DECODER,
    "mistral": _DECODER | {"sliding_window": 5},
    # A low cap, so that capping changes the logits of random weights.
    "gemma2": _DECODER
    | {"attn_logit_softcapping": 1.0, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gpt_oss": _DECODER
    | {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "gpt2": _GPT2,
    "bert": _BERT,
    "modernbert": _BERT
    | {
        "local_attention": 6,
        "attention_dropout": 0.0,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": _T5,
    "bloom": _BLOOM,
}
_HEADS = {
    "bert": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}


def tiny_model(name: str, attention: str = "sdpa", seed: int = 0, **fields: Any) -> PreTrainedModel:
    """In training mode, without dropout; weights large enough for attention to be uneven."""
    config = AutoConfig.for_model(name, **(FIELDS[name] | fields))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        factory = _HEADS.get(name, AutoModelForCausalLM)
        model = factory.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
    return model.train()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] of token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
