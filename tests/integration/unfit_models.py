"""Models of which each is unfit for some operation, and score tables of which most are wrong."""

from __future__ import annotations

import json
from pathlib import Path

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}
_GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 128}
_OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}


def _yarn(**more: object) -> dict[str, object]:
    return {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **more}


# No weights lie beside these, so nothing can read them.
MODELS: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "grouped": {**_LLAMA, "num_key_value_heads": 2},
    "multi-query": {**_LLAMA, "num_key_value_heads": 1},
    "six heads": {**_LLAMA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6},
    "biased": {**_LLAMA, "attention_bias": True},
    "mlp biased": {**_LLAMA, "mlp_bias": True},
    "dropping": {**_LLAMA, "attention_dropout": 0.1},
    "linear rope": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "yarn rope": {**_LLAMA, "rope_parameters": _yarn(original_max_position_embeddings=32)},
    "gptq": {**_LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "nf4": {
        **_LLAMA,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    },
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**_LLAMA, "model_type": "qwen2"},
    "phi3": {**_LLAMA, "model_type": "phi3", "pad_token_id": 0},
    "olmo2": {**_LLAMA, "model_type": "olmo2"},
    "gemma2": {**_LLAMA, "model_type": "gemma2", "head_dim": 8},
    "gemma3": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "hybrid": {
        **_LLAMA,
        "model_type": "qwen3_next",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek": {
        **_LLAMA,
        "model_type": "deepseek_v3",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "diffllama": {**_LLAMA, "model_type": "diffllama"},
    "gpt_neox": {**_LLAMA, "model_type": "gpt_neox"},
    "persimmon": {**_LLAMA, "model_type": "persimmon"},
    "falcon": {**_LLAMA, "model_type": "falcon", "multi_query": False, "alibi": False},
    "falcon alibi": {**_LLAMA, "model_type": "falcon", "multi_query": False, "alibi": True},
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 8},
    "mpt": {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 8},
    "codegen": {**_GPT2, "model_type": "codegen", "rotary_dim": 8, "n_ctx": 128},
    "gptj": {**_GPT2, "model_type": "gptj", "rotary_dim": 8},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "attention_types": [[["global", "local"], 1]],
    },
    "ctrl": {**_GPT2, "model_type": "ctrl", "dff": 64},
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2},
    "gpt2": _GPT2,
    "gpt2 odd": {**_GPT2, "n_embd": 36, "n_head": 4},
    "gpt2 inverse": {**_GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt2 cross": {**_GPT2, "add_cross_attention": True},
    "opt": _OPT,
    "opt post-norm": {**_OPT, "do_layer_norm_before": False},
    "opt projected": {**_OPT, "word_embed_proj_dim": 32},
    "bert": {
        "model_type": "bert",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 64,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 8,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
}
TASKS = {"bert": "masked_lm", "t5": "sequence_classification"}

_ROW = [float(head) for head in range(8)]
SCORES = {
    "good": json.dumps({"scores": [_ROW, _ROW]}),
    "not_json": "{oops",
    "no_table": json.dumps({"scores": 3}),
    "three_layers": json.dumps({"scores": [_ROW] * 3}),
    "seven_heads": json.dumps({"scores": [_ROW, _ROW[:7]]}),
    "not_finite": json.dumps({"scores": [[*_ROW[:7], float("nan")], _ROW]}),
    "word": json.dumps({"scores": [_ROW, [*_ROW[:7], "low"]]}),
    "bytes": "\udcff",  # no UTF-8
}


def write_places(root: Path) -> dict[str, Path]:
    """Directories with a config.json each, and score tables, by the names used here."""
    tokens = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    for name, config in MODELS.items():
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**tokens, **config}))
    for name, text in SCORES.items():
        (root / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    scores = {name: root / f"{name}.json" for name in SCORES}
    return {name: root / name.replace(" ", "_") for name in MODELS} | scores | {"root": root}
