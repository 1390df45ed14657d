"""What the generic rule of `shrink` cannot do, per config type."""

from __future__ import annotations

from typing import Any

_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_PER_KIND = {"full_attention": _PLAIN, "sliding_attention": _PLAIN}
# transformers 5.20 divides the head by it; its own default is for heads of 128.
_COMPASS = {kind: {**_PLAIN, "mrope_section": [1, 1, 2]} for kind in _PER_KIND}
_SLIDING = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]

# Model type, or the name of the config's class where it has none of its own → constructor
# arguments. They also hold for a sub-config of that type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 8, "n_embd": 64, "rotary_dim": 8},  # its heads lie in four equal blocks
    "cohere_compass_text": {"rope_parameters": _COMPASS, "layer_types": _SLIDING},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # what block_sparse turns to on short inputs
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "cvt": {"depth": (1, 2, 3)},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "distilbert": {"hidden_dim": 48},
    "donut-swin": {"patch_size": 1, "window_size": 4, "depths": (2, 1, 1, 1)},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "per_layer_config": {},
    },
    "efficientnet": {
        "width_coefficient": 0.1,
        "depth_coefficient": 1.0,
        "hidden_dim": 128,
        "image_size": 64,
    },
    "esm": {"vocab_size": 97, "pad_token_id": 0, "mask_token_id": 5},
    "funnel": {"block_sizes": (1, 1, 1)},
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_kv_shared_layers": 0,
        "layer_types": _SLIDING,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech_encoder": {"context_size": 8, "input_dim": 16},
    "glmasr_encoder": {"intermediate_size": 128},  # four positions of 32 are one audio token
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "granite_speech_plus_encoder": {"context_size": 8, "input_dim": 16},
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 16, 32, 32),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 32, 32, 32),
        "stage_numb_of_layers": (1, 1, 1, 1),
        "stage_num_blocks": (1, 1, 1, 1),
        "hidden_sizes": (16, 32, 32, 32),
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "levit": {"patch_size": 16, "image_size": 64},
    "mobilevit": {"image_size": 64, "patch_size": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2},  # sliding layers have twice as many
    "mobilevitv2": {"image_size": 64, "patch_size": 1, "base_attn_unit_dims": (16, 16, 32)},
    "neomme": {
        "rope_parameters": {
            "full_attention": _PLAIN | {"partial_rotary_factor": 0.5},
            "sliding_attention": _PLAIN | {"partial_rotary_factor": 1.0},
        }
    },
    "perceiver": {"image_size": 56, "num_self_attends_per_block": 2, "num_latents": 8},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    # Larger images and less reduction: else each query sees one key.
    "pvt": {"image_size": 64, "sequence_reduction_ratios": (2, 2, 1, 1)},
    "pvt_v2": {"image_size": 64, "sr_ratios": (2, 2, 1, 1)},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "roc_bert": {
        "shape_vocab_size": 97,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 97,
        "pronunciation_embed_dim": 16,
    },
    "segformer": {"image_size": 64, "sr_ratios": (2, 2, 1, 1)},
    "shieldgemma2": {"yes_token_index": 8, "no_token_index": 9},
    "swin": {"patch_size": 1, "window_size": 4, "depths": (2, 1, 1, 1)},
    "swinv2": {"patch_size": 1, "window_size": 4, "depths": (2, 1, 1, 1)},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "textnet": {"stem_out_channels": 32},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "voxtral": {"audio_token_id": 96},
    "voxtral_encoder": {"intermediate_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        # The attention layer is shared by at least two.
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}

_NATTEN = "neighbourhood attention needs the natten package, which is not installed"
_ALL_SHARED = (
    "all its layers take another model's keys, and transformers 5.23's `kv_sharing_modes` refuses"
    " a text model without a layer of its own"
)
_TIMM_TOWER = "its vision tower comes from the timm package, which is not installed"
_TIMM = "the network itself comes from the timm package, which is not installed"
# (kind, model type) whose class takes the composite config's `decoder`, which the auto class
# does not map.
DECODERS = {("causal-lm", "musicgen"), ("causal-lm", "musicgen_melody")}

# (kind, model type) → why no model of it can be built or run here.
UNBUILDABLE: dict[tuple[str, str], str] = {
    ("causal-lm", "gemma3n"): _TIMM_TOWER,
    ("causal-lm", "gemma4_assistant"): _ALL_SHARED,
    ("causal-lm", "gemma4_unified_assistant"): _ALL_SHARED,
    ("image-classification", "dinat"): _NATTEN,
    ("image-classification", "timm_wrapper"): _TIMM,
}

# (kind, model type, switch) → why a model with that switch turned shows nothing.
SHOWS_NOTHING: dict[tuple[str, str, str], str] = {
    ("masked-lm", "ibert", "quant_mode"): (
        "its activations are quantized by ranges that training has to find first"
    ),
}

# (kind, model type) of models that draw random numbers in eval mode.
NONDETERMINISTIC: set[tuple[str, str]] = set()

# Types whose code mixes in fp32 tensors or constants that fp64 refuses. (The logits of some
# others are fp32 although the model is fp64: a cast to float before the head or in a recurrence.)
NO_FP64 = {"fsmt", "inkling2_text", "mra", "xglm"}
