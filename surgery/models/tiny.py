"""Tiny models of an architecture: its config with every size made small, and random weights.

What a model does with its inputs (masks, positions) follows from its class and from the switches
of its config, not from its sizes. A tiny model shows it in milliseconds, before any weight is read.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

# What a caller sets itself: config → field name → value.
Override = Callable[[PreTrainedConfig], Mapping[str, Any]]

SPREAD = 0.2  # standard deviation of random weights
HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 8, 32, 48, 2
VOCAB, POSITIONS, IMAGE, PATCH, EXPERTS, TOP_K = 97, 64, 32, 8, 4, 2
MOST_LAYERS = 4
FIRST_MARKER = 96  # ids of image, audio, ... tokens count down from here


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


KV_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}
# Fields with the number of layers.
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
# Fields that get a tiny value although their default is None: elsewhere None is a choice.
FILLED = {"head_dim", "num_experts_per_tok", "n_shared_experts", "n_routed_experts"}


def make_tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a config with tiny sizes; its switches and kinds of layer stay.

    Raises whatever the architecture raises where its sizes do not follow the names above.
    """
    tiny = copy.deepcopy(config)
    if hasattr(tiny, "quantization_config"):  # of tensors that the copy does not have
        del tiny.quantization_config
    for name, value in list_tiny_fields(config).items():
        setattr(tiny, name, value)
    return tiny


def build_tiny_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, implementation: str | None
) -> PreTrainedModel:
    """Build a tiny model on the CPU in fp32 and eval mode; weights are the same at every call.

    Args:
        config: already tiny.
        implementation: of attention; ``None`` leaves the choice to transformers.

    Raises whatever the architecture raises.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    with _in_full_precision(), torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet():
        torch.manual_seed(0)  # for buffers that are drawn
        return randomize_(model_class(config).float(), seed=0).eval()


def randomize_(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw weights wide enough for uneven attention, norms that are not 1, biases that are not 0.

    Tensors that are computed anew whenever the model is built stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    computed = model._keys_to_ignore_on_save or ()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in computed):
                continue
            noise = SPREAD * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what architectures say about a tiny model: nobody asked for it."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def list_tiny_fields(
    config: PreTrainedConfig,
    override: Override = lambda _: {},
    marker: Iterator[int] | None = None,
) -> dict[str, Any]:
    """List the fields that make a config tiny: name → value, a config where the field holds one.

    Args:
        override: fields that the caller sets itself, of this config and of each one in it.
        marker: ids for tokens that mark images, audio, ….
    """
    marker = marker or iter(range(FIRST_MARKER, 0, -1))
    own = override(config)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = field.name
        if not field.init or name in own:
            continue
        value = get_field(config, name)
        if isinstance(value, PreTrainedConfig):
            fields = _list_switches(value) | list_tiny_fields(value, override, marker)
            found[name] = type(value)(**fields)
            continue
        tiny = _shrink(name, value, marker)
        if tiny is not None:
            found[name] = tiny
    found |= _cut_layer_lists(config, found, own)
    if isinstance(rope := get_field(config, "rope_parameters"), dict):
        found["rope_parameters"] = _shrink_rope(rope, found.get("head_dim", HEAD_DIM))
    return found | dict(own)


def _list_switches(part: PreTrainedConfig) -> dict[str, Any]:
    """List what the whole decided for a part, such as that a decoder has cross-attention."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {
        field.name: value
        for field in dataclasses.fields(part)
        if field.init
        and field.name not in common
        and isinstance(value := get_field(part, field.name), bool | str)
    }


def get_field(config: PreTrainedConfig, name: str) -> Any:
    """Get a field's value for the whole model, where layers may have their own."""
    try:
        return config._getattr_without_heterogeneous_validation(name)
    except AttributeError:
        return None


def _shrink(name: str, value: Any, marker: Iterator[int]) -> Any:
    """Make the tiny value; ``None`` leaves the field as it is."""
    if isinstance(value, bool):
        return None
    if "drop" in name:
        return shape_like(value, 0) if holds_numbers(value) else None
    if name.endswith(("token_id", "token_index")):
        if isinstance(value, list):
            value = value[0] if value else None
        role = name.removesuffix("_token_id")
        if value is None:
            return None
        return TOKENS[role] if role in TOKENS else next(marker)
    if name in KV_HEADS and (value is None or holds_numbers(value)):
        return shape_like(value, HEADS)
    if value is None and name in FILLED:
        return TINY[name]
    return shape_like(value, TINY[name]) if name in TINY and holds_numbers(value) else None


def holds_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(holds_numbers(each) for each in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def shape_like(value: Any, tiny: int) -> Any:
    """Give `tiny` the type of `value`: lists item by item, and a zero stays zero."""
    if isinstance(value, list | tuple):
        return type(value)(shape_like(each, tiny) for each in value)
    return type(value)(tiny if value else 0) if value is not None else tiny


def _cut_layer_lists(
    config: PreTrainedConfig, found: dict[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Cut lists of kinds of layer to the number of layers: every kind is there if four do."""
    count = next((name for name in (*found, *own) if name in LAYER_COUNTS), None)
    before = None if count is None else get_field(config, count)
    if count is None or not isinstance(before, int) or before <= LAYERS:
        return {}
    lists = {
        field.name: list(dict.fromkeys(value))
        for field in dataclasses.fields(config)
        if isinstance(value := get_field(config, field.name), list | tuple)
        and len(value) == before
        and all(isinstance(each, str) for each in value)
    }
    cut: dict[str, Any] = {}
    layers = own.get(count)
    if layers is None:
        kinds = max((len(kinds) for kinds in lists.values()), default=0)
        layers = cut[count] = min(MOST_LAYERS, max(LAYERS, kinds))
    return cut | {
        name: (kinds * layers)[:layers] for name, kinds in lists.items() if name not in own
    }


def _shrink_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Keep the kind of rotary embedding; sections and per-frequency factors fit `head_dim`."""
    if rope and all(isinstance(each, dict) or each is None for each in rope.values()):
        return {key: each and _shrink_rope(each, head_dim) for key, each in rope.items()}
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
