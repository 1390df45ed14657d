"""The names that architectures give to the parts of an attention block."""

from __future__ import annotations

from surgery.models.sites.site import Packing

# Separate projections: query, key, value.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("Wq", "Wk", "Wv"),
    ("project_q", "project_k", "project_v"),
    ("q_head", "k_head", "v_head"),
)

_CONTIGUOUS = Packing(("query", "key", "value"), 1, grouped=False)
_GROUPED = Packing(("query", "key", "value"), 0, grouped=True)
# One projection for all three, and how they are usually packed in it.
FUSED = {
    "c_attn": _CONTIGUOUS,
    "qkv_proj": _CONTIGUOUS,
    "Wqkv": _CONTIGUOUS,
    "qkv": _CONTIGUOUS,
    "query_key_value": _GROUPED,
    "in_proj": _GROUPED,
}
# Architectures (by config.model_type) that pack them in another way.
FUSED_BY_TYPE = {
    "gpt_bigcode": _GROUPED,
    "codegen": Packing(("query", "value", "key"), 4, grouped=False),
}

# The output projection inside the block.
OUTPUTS = (
    "o_proj",
    "out_proj",
    "dense",
    "out_lin",
    "o",
    "Wo",
    "attention_out",
    "proj",
    "c_proj",
    "output_projection",
    "post_proj",
)
# The output projection beside the block: BERT's `attention.self` and `attention.output.dense`.
OUTPUTS_BESIDE = ("output.dense", "output")

# The Linear of a projection that is a module around it (Moshi).
WRAPPED = "linear"

Q_NORMS = ("q_norm", "q_layernorm", "query_norm", "query_layernorm")
K_NORMS = ("k_norm", "k_layernorm", "key_norm", "key_layernorm")

HEAD_DIMS = (
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "d_head",
    "dim_head",
    "attention_head_dim",
    "dim_per_head",
    "qk_head_dim",
)
Q_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head")
# Other attributes of a block that depend on head counts: KV heads, groups and widths.
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
GROUPS = "num_key_value_groups"
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "split_size", "embed_dim", "hidden_size")

# The argument that is a cache of keys and values, of models and of blocks; the first since
# transformers 5.24.
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")

# Parts of a path that mean cross-attention: keys and values come from another sequence.
CROSS = ("encoder_attn", "crossattention", "cross_attn", "EncDecAttention", "cross_attention")
# Parts of a prefix that mean a config for images or sound.
OTHER_SENSES = ("vision", "image", "audio", "speech", "video", "encoder_config")

# Softmax attention that no operation here can change, by class name, with the reason.
REFUSED = {
    "MraSelfAttention": "its attention is an approximation by blocks",
    "NystromformerSelfAttention": "its attention is an approximation by landmarks",
    "YosoSelfAttention": "its attention is an approximation by hashing",
    "DiffLlamaAttention": "its heads work in pairs across the two halves (differential attention)",
}
