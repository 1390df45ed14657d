"""Small base models of all kinds of attention that can drop; nothing drops in them yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from tests.families import brings_own_attention, family_config, randomised

VOCAB = 61
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = _TEXT | {"image_size": 8, "patch_size": 4}
_ROTARY = {"rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}

# Name → model type and fields.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("albert", _TEXT | {"embedding_size": 16}),
    "bart": ("bart", _SEQ2SEQ),
    "bert": ("bert", _TEXT),
    "biogpt": ("biogpt", _TEXT),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "clip_vision": ("clip_vision_model", _IMAGE),
    "codegen": ("codegen", _GPT | _ROTARY),
    "deberta_v2": ("deberta-v2", _TEXT),
    "dinov2": ("dinov2", _IMAGE),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "electra": ("electra", _TEXT | {"embedding_size": 16}),
    "falcon_alibi": ("falcon", _TEXT | {"alibi": True}),
    "gpt2": ("gpt2", _GPT | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_bigcode": ("gpt_bigcode", _GPT | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neo": (
        "gpt_neo",
        _TEXT | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("gpt_neox", _TEXT),
    "gptj": ("gptj", _GPT | _ROTARY),
    "m2m_100": ("m2m_100", _SEQ2SEQ),
    "modernbert": (
        "modernbert",
        _TEXT | {"local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "mpt": (
        "mpt",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "opt": ("opt", _TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "persimmon": ("persimmon", _TEXT),
    "roberta": ("roberta", _TEXT),
    "roformer": ("roformer", _TEXT),
    "t5": (
        "t5",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": ("vit", _IMAGE),
}
_LLAMAS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "olmo2",
    "granite",
    "cohere",
    "exaone4",
    "glm4",
    "gpt_oss",
    "mixtral",
    "nanochat",
    "smollm3",
    "stablelm",
    "starcoder2",
)
NAMES = sorted([*_OTHERS, *_LLAMAS])


def config_of(name: str) -> PreTrainedConfig:
    if name in _OTHERS:
        model_type, fields = _OTHERS[name]
        config = AutoConfig.for_model(model_type, **fields)
    else:
        config = family_config(name)
    _drop_nothing(config)
    return config


def _drop_nothing(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _drop_nothing(value)
        elif ("drop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)


def base_model(name: str, attention: str | None = "eager") -> PreTrainedModel:
    """In eval mode, in fp64."""
    extra = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    model = AutoModel.from_config(config_of(name), **extra)
    if hasattr(model, "set_experts_implementation") and name in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    return randomised(model, 0, torch.float64)


def run(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Last hidden states, with random numbers from `seed`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
            return model(pixel_values=pixels).last_hidden_state
        ids = torch.randint(3, VOCAB, (2, 12), generator=generator)
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids.flip(0)
        return model(**inputs).last_hidden_state


def zero_contexts(model: PreTrainedModel, paths: list[str]) -> list[RemovableHandle]:
    """Let the output projections at `paths` read zeros."""

    def zeros(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.zeros_like(args[0]), *args[1:])

    return [model.get_submodule(path).register_forward_pre_hook(zeros) for path in paths]


# What transformers' interface does not serve decides for itself between eager and sdpa.
OWN_ATTENTION = {name for name in NAMES if brings_own_attention(config_of(name).model_type)}
