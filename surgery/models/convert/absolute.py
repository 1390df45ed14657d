"""GPT-2, GPT-BigCode and OPT to Starcoder2: the same blocks, with rotary positions and GQA.

LayerNorms, biases and the two-layer MLP are the same. Starcoder2 has no learned positions, so
these pairs need to know what replaces them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from surgery.models.convert.pair import (
    ArchitecturePair,
    ConfigValue,
    Requirement,
    Rule,
    is_untied,
    make_copy_rule,
    make_renaming_rules,
)

_BOTH = ("weight", "bias")
_TARGET = "model.layers.{layer}"
_QKV = tuple(f"{_TARGET}.self_attn.{name}_proj" for name in ("q", "k", "v"))

_EVEN_HEADS = Requirement(
    "num_attention_heads",
    lambda c: (c.hidden_size // c.num_attention_heads) % 2 == 0,
    "rotary positions need heads of even width",
)
_PADDING = Requirement(
    "pad_token_id",
    lambda c: c.pad_token_id is None or c.pad_token_id < c.vocab_size,
    "Starcoder2 needs a padding token within the vocabulary",
)
_HEAD = make_copy_rule("lm_head.weight", when=is_untied)


def _get_inner_size(config: PreTrainedConfig) -> int:
    return config.n_inner if config.n_inner is not None else 4 * config.hidden_size


# --- GPT-2 and GPT-BigCode ---------------------------------------------------------------------

_BLOCK = "transformer.h.{layer}"
_GPT_FIELDS: dict[str, str | ConfigValue] = {
    "intermediate_size": _get_inner_size,
    "hidden_act": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "use_bias": lambda config: True,
    "sliding_window": lambda config: None,
}
_GPT_NEEDS = (
    Requirement("scale_attn_weights", lambda c: c.scale_attn_weights, "Starcoder2 always scales"),
    Requirement(
        "add_cross_attention", lambda c: not c.add_cross_attention, "Starcoder2 has no encoder"
    ),
    _EVEN_HEADS,
    _PADDING,
)


def _make_gpt_rules(linear: str) -> tuple[Rule, ...]:
    """Make the rules that GPT-2 and GPT-BigCode share.

    Args:
        linear: transform of a matrix, ``transpose`` from a Conv1D and ``copy`` from a Linear.
    """
    return (
        Rule("copy", ("transformer.wte.weight",), ("model.embed_tokens.weight",)),
        *make_renaming_rules("copy", "transformer.ln_f", "model.norm", *_BOTH),
        *make_renaming_rules("copy", f"{_BLOCK}.ln_1", f"{_TARGET}.input_layernorm", *_BOTH),
        *make_renaming_rules(
            "copy", f"{_BLOCK}.ln_2", f"{_TARGET}.post_attention_layernorm", *_BOTH
        ),
        *(
            rule
            for source, result in (
                ("attn.c_proj", "self_attn.o_proj"),
                ("mlp.c_fc", "mlp.c_fc"),
                ("mlp.c_proj", "mlp.c_proj"),
            )
            for rule in (
                *make_renaming_rules(linear, f"{_BLOCK}.{source}", f"{_TARGET}.{result}", "weight"),
                *make_renaming_rules("copy", f"{_BLOCK}.{source}", f"{_TARGET}.{result}", "bias"),
            )
        ),
        _HEAD,
    )


def _make_c_attn_rule(tensor: str, transform: str, **options: Any) -> Rule:
    return Rule(
        transform,
        (f"{_BLOCK}.attn.c_attn.{tensor}",),
        tuple(f"{path}.{tensor}" for path in _QKV),
        **options,
    )


def _get_bigcode_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_attention_heads
    return {"sizes": [config.hidden_size, head_dim, head_dim]}


def _get_bigcode_heads(config: PreTrainedConfig) -> dict[str, Any]:
    return {"heads": config.num_attention_heads, "parts": 3}


GPT2 = ArchitecturePair(
    "gpt2",
    "starcoder2",
    (
        *_GPT_NEEDS,
        Requirement(
            "scale_attn_by_inverse_layer_idx",
            lambda c: not c.scale_attn_by_inverse_layer_idx,
            "Starcoder2 scales all layers in the same way",
        ),
        Requirement(
            "reorder_and_upcast_attn",
            lambda c: not c.reorder_and_upcast_attn,
            "Starcoder2 computes its scores in the model's dtype",
        ),
    ),
    {**_GPT_FIELDS, "num_key_value_heads": "num_attention_heads"},
    (
        *_make_gpt_rules("transpose"),
        _make_c_attn_rule(
            "weight",
            "split",
            arguments=lambda c: {"sizes": [c.hidden_size] * 3, "transposed": True},
        ),
        _make_c_attn_rule("bias", "split", arguments=lambda c: {"sizes": [c.hidden_size] * 3}),
    ),
    positions="transformer.wpe.weight",
)

GPT_BIGCODE = ArchitecturePair(
    "gpt_bigcode",
    "starcoder2",
    _GPT_NEEDS,
    {
        **_GPT_FIELDS,
        "num_key_value_heads": lambda c: 1 if c.multi_query else c.num_attention_heads,
    },
    (
        *_make_gpt_rules("copy"),
        *(
            rule
            for tensor in _BOTH
            for rule in (
                _make_c_attn_rule(
                    tensor, "split", arguments=_get_bigcode_sizes, when=lambda c: c.multi_query
                ),
                _make_c_attn_rule(
                    tensor,
                    "split_heads",
                    arguments=_get_bigcode_heads,
                    when=lambda c: not c.multi_query,
                ),
            )
        ),
    ),
    positions="transformer.wpe.weight",
)

# --- OPT ---------------------------------------------------------------------------------------

_DECODER = "model.decoder"
_LAYER = f"{_DECODER}.layers.{{layer}}"
_MATRICES = (
    ("self_attn.q_proj", "self_attn.q_proj"),
    ("self_attn.k_proj", "self_attn.k_proj"),
    ("self_attn.v_proj", "self_attn.v_proj"),
    ("self_attn.out_proj", "self_attn.o_proj"),
    ("fc1", "mlp.c_fc"),
    ("fc2", "mlp.c_proj"),
)


def _has_bias(config: PreTrainedConfig) -> bool:
    return bool(config.enable_bias)


OPT = ArchitecturePair(
    "opt",
    "starcoder2",
    (
        Requirement(
            "do_layer_norm_before",
            lambda c: c.do_layer_norm_before,
            "Starcoder2 normalises before attention and MLP",
        ),
        Requirement(
            "_remove_final_layer_norm",
            lambda c: not c._remove_final_layer_norm,
            "Starcoder2 has a final LayerNorm",
        ),
        Requirement(
            "word_embed_proj_dim",
            lambda c: c.word_embed_proj_dim == c.hidden_size,
            "Starcoder2 has no projections around its embeddings",
        ),
        Requirement(
            "layer_norm_elementwise_affine",
            lambda c: c.layer_norm_elementwise_affine,
            "Starcoder2's LayerNorms have weights",
        ),
        Requirement(
            "layerdrop", lambda c: not c.layerdrop, "Starcoder2 drops no layers in training"
        ),
        _EVEN_HEADS,
        _PADDING,
    ),
    {
        "num_key_value_heads": "num_attention_heads",
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "norm_epsilon": lambda config: 1e-5,  # torch's default; OPT's config does not have it
        "initializer_range": "init_std",
        "residual_dropout": "dropout",
        "embedding_dropout": lambda config: 0.0,
        "use_bias": "enable_bias",
        "sliding_window": lambda config: None,
    },
    (
        *make_renaming_rules("copy", f"{_DECODER}.embed_tokens", "model.embed_tokens", "weight"),
        *make_renaming_rules("copy", f"{_DECODER}.final_layer_norm", "model.norm", *_BOTH),
        *make_renaming_rules(
            "copy", f"{_LAYER}.self_attn_layer_norm", f"{_TARGET}.input_layernorm", *_BOTH
        ),
        *make_renaming_rules(
            "copy", f"{_LAYER}.final_layer_norm", f"{_TARGET}.post_attention_layernorm", *_BOTH
        ),
        *(
            rule
            for source, result in _MATRICES
            for rule in (
                *make_renaming_rules("copy", f"{_LAYER}.{source}", f"{_TARGET}.{result}", "weight"),
                *make_renaming_rules(
                    "copy", f"{_LAYER}.{source}", f"{_TARGET}.{result}", "bias", when=_has_bias
                ),
            )
        ),
        _HEAD,
    ),
    positions="model.decoder.embed_positions.weight",
)

PAIRS = (GPT2, GPT_BIGCODE, OPT)
