"""What architectures call the parts of an attention block: all that is known by name."""

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
# One projection for all three, and how they usually lie in it.
FUSED = {
    "c_attn": _CONTIGUOUS,
    "qkv_proj": _CONTIGUOUS,
    "Wqkv": _CONTIGUOUS,
    "qkv": _CONTIGUOUS,
    "query_key_value": _GROUPED,
    "in_proj": _GROUPED,
}
# Where an architecture (by config.model_type) differs from that.
FUSED_BY_TYPE = {
    "gpt_bigcode": _GROUPED,
    "codegen": Packing(("query", "value", "key"), 4, grouped=False),
}

# The output projection, in the block itself.
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
# Or beside it: BERT's `attention.self` and `attention.output.dense`.
OUTPUTS_BESIDE = ("output.dense", "output")

# What a projection's own Linear is called where a module is put around it (Moshi).
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
# What else counts heads in a block: attributes that follow query heads, KV heads, or widths.
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
GROUPS = "num_key_value_groups"
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "split_size", "embed_dim", "hidden_size")

# Parts of a path that say that keys and values come from elsewhere.
CROSS = ("encoder_attn", "crossattention", "cross_attn", "EncDecAttention", "cross_attention")
# Configs of other senses than text.
OTHER_SENSES = ("vision", "image", "audio", "speech", "video", "encoder_config")

# Softmax attention whose arithmetic no operation here can follow, by class name, and why.
REFUSED = {
    "MraSelfAttention": "its attention is an approximation by blocks",
    "NystromformerSelfAttention": "its attention is an approximation by landmarks",
    "YosoSelfAttention": "its attention is an approximation by hashing",
    "DiffLlamaAttention": "its heads work in pairs across the two halves (differential attention)",
}
