"""Tiny GGUF files, written by the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

Kind = gguf.GGMLQuantizationType
WORDS = ("<end>", "<start>", *"abcdefghij0123456789", "Ġ", "ab", "Ġa", "ĠĠ")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def make_llama(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES | {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0} | fields
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a projection as llama.cpp rotates them: pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    kind: Any = Kind.F32,
    architecture: str = "llama",
    pre: str = "smollm",
    fields: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda _: None,
) -> Path:
    """Write a llama, its matrices quantized as `kind`.

    Args:
        fields: more metadata, whole numbers, shares and texts.
        change: of the tensors, by their names in the file.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size, pre)
    for name, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(name, value)
    tensors = _name_tensors(model)
    change(tensors)
    for name, tensor in tensors.items():
        flat = tensor.ndim == 1 or kind is Kind.F32
        data = tensor if flat else gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=None if flat else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, suffix = name.rsplit(".", 1)
        count = heads.get(module.rpartition(".")[2])
        data = tensor if count is None else interleave(tensor, count)
        tensors[f"{names.get_name(module)}.{suffix}"] = data.contiguous().numpy()
    return tensors


def _add_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str) -> None:
    words = [*WORDS, *(f"<{number}>" for number in range(size - len(WORDS)))]
    special = [word.startswith("<") for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if is_special else 1 for is_special in special])
    writer.add_token_merges(["a b", "Ġ a", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
