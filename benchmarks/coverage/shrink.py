"""A model type's default config, shrunk: one table from field names to tiny values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from benchmarks.coverage.exceptions import EXCEPTIONS

HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 8, 32, 48, 2
VOCAB, POSITIONS, IMAGE, PATCH, EXPERTS, TOP_K = 97, 64, 32, 8, 4, 2
MOST_LAYERS = 4
FIRST_MARKER = 96  # ids of image, audio, ... tokens count down from here


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


KV_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}
LAYER_COUNTS = _each(
    LAYERS,
    """num_hidden_layers n_layer n_layers num_layers num_encoder_layers num_decoder_layers
    encoder_layers decoder_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers
    conf_num_hidden_layers num_blocks depth num_global_layers num_layers_per_stack""",
)

# Field name → tiny value, in a config at any depth.
TINY: dict[str, int] = (
    LAYER_COUNTS
    | _each(
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        attention_heads conf_num_attention_heads num_self_attention_heads
        num_cross_attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads
        linear_num_key_heads linear_num_value_heads num_query_groups""",
    )
    | _each(
        HEAD_DIM,
        """head_dim d_kv d_head attention_head_dim attention_head_size dim_head kv_channels
        swa_head_dim global_head_dim index_head_dim linear_head_dim linear_key_head_dim
        linear_value_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head
        mamba_head_dim mamba_headdim rotary_dim query_pre_attn_scalar""",
    )
    | _each(
        HIDDEN,
        """hidden_size n_embd d_model embed_dim emb_dim embedding_dim embedding_size dim hidden_dim
        d_latents true_hidden_size intra_bottleneck_size input_embedding_size
        output_embedding_size hidden_size_global lru_width encoder_hidden_size
        cross_attention_hidden_size output_dim projection_dim projection_size
        audio_hidden_size backbone_hidden_size word_embed_proj_dim pooler_hidden_size
        pooler_output_size attention_hidden_size
        prediction_head_size entity_emb_size out_hidden_size hidden_sizes input_size
        decoder_hidden_size""",
    )
    | _each(
        FFN,
        """intermediate_size ffn_dim d_ff d_inner n_inner dff dim_ff encoder_ffn_dim
        decoder_ffn_dim feed_forward_size ffn_hidden_size mlp_dim dense_intermediate_size
        intermediate_size_mlp prefix_dense_intermediate_size shared_intermediate_size
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim""",
    )
    | _each(
        16,
        """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size
        kv_lora_rank q_lora_rank o_lora_rank qk_head_dim mamba_d_state ssm_state_size state_size
        mamba_dt_rank time_step_rank adapter_rank laurel_rank embedding_rank
        hidden_size_per_layer_input moe_latent_size num_mel_bins num_filters d_rel
        gated_norm_rank max_source_positions""",
    )
    | _each(VOCAB, "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size")
    | _each(VOCAB, "decoder_vocab_size unpadded_vocab_size entity_vocab_size t2u_vocab_size")
    | _each(
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings
        max_2d_position_embeddings t2u_max_position_embeddings num_position_embeddings
        model_max_length max_pos_emb original_max_position_embeddings""",
    )
    | _each(
        EXPERTS,
        """num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num""",
    )
    | _each(
        TOP_K,
        """num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts""",
    )
    | _each(1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts")
    | _each(1, "moe_num_shared_experts first_k_dense_replace num_dense_layers depths")
    | _each(1, "mamba_n_groups mamba_ngroups n_groups num_block_repeats")
    | _each(4, "mm_tokens_per_image")
    | _each(8, "mamba_n_heads mamba_num_heads n_mamba_heads mamba_chunk_size chunk_size")
    | _each(64, "mamba_d_ssm")
    | _each(
        8,
        """sliding_window sliding_window_size local_attention attention_window
        attention_window_size attention_chunk_size window_size""",
    )
    | _each(IMAGE, "image_size")
    | _each(PATCH, "patch_size")
)

TOKENS = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "cls": 3,
    "sep": 4,
    "mask": 5,
    "decoder_start": 1,
    "unk": 6,
    "forced_eos": 2,
    "forced_bos": 1,
}
# Fields that look like sizes of something else in these configs are left to EXCEPTIONS.


# Fields that get a tiny value although their default is None: elsewhere None is a choice.
FILLED = {"head_dim", "num_experts_per_tok", "n_shared_experts", "n_routed_experts"}
# Types other than latent attention that accept no fewer KV heads than query heads.
AS_MANY = {
    "esmc",
    "nemotron3_5_transcribe_asr_audio",
    "nemotron3_5_transcribe_word_timestamp",
    "nemotron3_diarization_audio",
}


def exception(config: PreTrainedConfig) -> dict[str, Any]:
    """What this config's type is given instead of what the rule would give."""
    return EXCEPTIONS.get(type(config).__name__) or EXCEPTIONS.get(config.model_type) or {}


def tiny_config(
    model_type: str, *, decoder: bool, kv_heads: int | None, **extra: Any
) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk; `decoder`: causal, if the type can be both."""
    default = AutoConfig.for_model(model_type)
    found = tiny_fields(default, kv_heads) | extra
    if decoder and not default.is_encoder_decoder and hasattr(default, "is_decoder"):
        found["is_decoder"] = True
    return AutoConfig.for_model(model_type, **found)


def tiny_fields(
    default: PreTrainedConfig, kv_heads: int | None = None, marker: Iterator[int] | None = None
) -> dict[str, Any]:
    """Constructor arguments for a tiny config of `default`'s class."""
    marker = marker or iter(range(FIRST_MARKER, 0, -1))
    if get_value(default, "kv_lora_rank") is not None or default.model_type in AS_MANY:
        kv_heads = None
    own = exception(default)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        name = field.name
        if not field.init or (name in own and not (kv_heads and name in KV_HEADS)):
            continue
        value = get_value(default, name)
        if isinstance(value, PreTrainedConfig):
            found[name] = type(value)(**(_switches(value) | tiny_fields(value, kv_heads, marker)))
            continue
        tiny = _tiny(name, value, kv_heads, marker)
        if tiny is not None:
            found[name] = tiny
    found |= _layer_lists(default, found, own)
    if isinstance(rope := get_value(default, "rope_parameters"), dict):
        found["rope_parameters"] = _rope(rope, found.get("head_dim", HEAD_DIM))
    return found | {
        name: value for name, value in own.items() if not (kv_heads and name in KV_HEADS)
    }


def _switches(part: PreTrainedConfig) -> dict[str, Any]:
    """What the whole decided for a part, such as that a decoder has cross-attention."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {
        field.name: value
        for field in dataclasses.fields(part)
        if field.init
        and field.name not in common
        and isinstance(value := get_value(part, field.name), bool | str)
    }


def get_value(config: PreTrainedConfig, name: str) -> Any:
    """A field's value for the whole model, where layers may have their own."""
    try:
        return config._getattr_without_heterogeneous_validation(name)
    except AttributeError:
        return None


def _tiny(name: str, value: Any, kv_heads: int | None, marker: Iterator[int]) -> Any:
    """The tiny value, or None for "as it is"."""
    if name == "multi_query":
        return kv_heads == 1
    if name == "new_decoder_architecture":  # Falcon's: the one that reads `num_kv_heads`
        return kv_heads not in (None, 1, HEADS)
    if isinstance(value, bool):
        return None
    if "drop" in name:
        return _like(value, 0) if _numbers(value) else None
    if name.endswith(("token_id", "token_index")):
        if isinstance(value, list):
            value = value[0] if value else None
        role = name.removesuffix("_token_id")
        if value is None:
            return None
        return TOKENS[role] if role in TOKENS else next(marker)
    if name in KV_HEADS and (value is None or _numbers(value)):
        return _like(value, kv_heads or HEADS)
    if value is None and name in FILLED:
        return TINY[name]
    return _like(value, TINY[name]) if name in TINY and _numbers(value) else None


def _numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_numbers(each) for each in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _like(value: Any, tiny: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_like(each, tiny) for each in value)
    return type(value)(tiny if value else 0) if value is not None else tiny


def _layer_lists(
    default: PreTrainedConfig, found: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Lists of kinds of layer, cut to the number of layers: every kind is there if four do."""
    count = next((name for name in found if name in LAYER_COUNTS), None)
    before = count and get_value(default, count)
    if not isinstance(before, int) or before <= LAYERS:
        return {}
    lists = {
        field.name: list(dict.fromkeys(value))
        for field in dataclasses.fields(default)
        if isinstance(value := get_value(default, field.name), list | tuple)
        and len(value) == before
        and all(isinstance(each, str) for each in value)
    }
    if count in own:
        found[count] = own[count]
    else:
        kinds = max((len(kinds) for kinds in lists.values()), default=0)
        found[count] = min(MOST_LAYERS, max(LAYERS, kinds))
    layers = found[count]
    return {name: (kinds * layers)[:layers] for name, kinds in lists.items() if name not in own}


def _rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The same kind of rotary embedding; sections and per-frequency factors fit `head_dim`."""
    if rope and all(isinstance(each, dict) or each is None for each in rope.values()):
        return {key: each and _rope(each, head_dim) for key, each in rope.items()}
    tiny = dict(rope)
    pairs = int(head_dim * tiny.get("partial_rotary_factor", 1.0)) // 2
    if section := tiny.get("mrope_section"):
        share, rest = divmod(pairs, len(section))
        tiny["mrope_section"] = [share + (index < rest) for index in range(len(section))]
    for name in ("short_factor", "long_factor"):
        if name in tiny:
            tiny[name] = [1.0] * pairs
    if "original_max_position_embeddings" in tiny:
        tiny["original_max_position_embeddings"] = POSITIONS
    return tiny
