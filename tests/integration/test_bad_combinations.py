"""Every combination that cannot be: refused while planning, from a config.json and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import Gemma2ForCausalLM

from surgery.plan.registry import find_operations
from tests.families import brings_own_attention
from tests.integration.unfit_models import TASKS, write_places

GQA, PRUNE, ROPE = "attention.gqa", "attention.prune_heads", "attention.rope"
BACKEND, FUSE, REHOUSE = "attention.backend", "attention.fuse_qkv", "attention.rehouse"
TO_ROPE, DROP = "attention.absolute_to_rope", "attention.attention_dropout"
WINDOW, BUDGET = "attention.sliding_window", "attention.fit_budget"
KV, INTO, RUN = f"{GQA}.kv_heads", f"{REHOUSE}.into", f"{BACKEND}.implementation"
HEADS, COUNT, TABLE = f"{PRUNE}.heads", f"{PRUNE}.count", f"{PRUNE}.scores"
COUNTS = "a whole number, a list with one number per layer, or {average: number}"
LISTS = "a list of heads for every layer, or {layer: [heads]}"
JSON = "a JSON file"
QUANTIZED = "quantized weights cannot be operated on"
NO_WINDOW = "config cannot say a window"
NO_ROPE = "no rotary embedding that reads rope_parameters"
FIRST = "must come first"
NO_TARGET = "not the same model: "
EVERY = "[0,1,2,3,4,5,6,7]"
EMPTIED = f"{PRUNE}.heads={{1:{EVERY}}} {PRUNE}.remove_attention=true "


class Bad(NamedTuple):
    """A model, `attention=[…]` with its options, and what the message must say of them.

    `given` and `valid` are how those lines begin; "" for a message without the line.
    """

    model: str
    attention: str
    options: str
    key: str
    problem: str
    given: str
    valid: str


def _gqa(model: str, kv_heads: str, problem: str, given: str, valid: str, **more: str) -> Bad:
    """A row about `attention.gqa`; its key is that of the counts unless `key` says another."""
    options = f"{KV}={kv_heads} {more.get('options', '')}"
    return Bad(model, "gqa", options, more.get("key", KV), problem, given, valid)


def _prune(
    options: str,
    key: str,
    problem: str,
    given: str,
    valid: str,
    model: str = "llama",
    more: str = "",
) -> Bad:
    spelt = " ".join(f"{PRUNE}.{option}" for option in options.split())
    return Bad(model, "prune_heads", f"{spelt} {more}", key, problem, given, valid)


def _rope(
    kind: str, options: str, key: str, problem: str, given: str, valid: str, model: str = "llama"
) -> Bad:
    spelt = " ".join(f"{ROPE}.{option}" for option in options.split())
    key = f"{ROPE}.{key}" if key else ROPE
    return Bad(model, kind, spelt, key, problem, given, valid)


def _run(model: str, implementation: str, problem: str, valid: str) -> Bad:
    return Bad(model, "backend", f"{RUN}={implementation}", RUN, problem, implementation, valid)


def _move(model: str, into: str, problem: str, valid: str) -> Bad:
    return Bad(model, "rehouse", f"{INTO}={into}", INTO, problem, into, valid)


def _window(model: str, options: str, key: str, problem: str, given: str, valid: str) -> Bad:
    spelt = " ".join(f"{WINDOW}.{option}" for option in options.split())
    return Bad(model, "sliding_window", spelt, WINDOW + key, problem, given, valid)


def _to_rope(model: str, problem: str) -> Bad:
    return Bad(model, "absolute_to_rope", "", TO_ROPE, NO_TARGET + problem, "", "none, for this")


TABLE_OF_ROWS = {
    # gqa: counts
    "kv_heads below zero": _gqa("llama", "-2", "does not divide the 8", "-2", "1, 2, 4, 8"),
    "kv_heads a fraction": _gqa("llama", "2.5", "must be a number of heads", "2.5", COUNTS),
    "kv_heads a mapping": _gqa("llama", "{0:4}", "must be a number of heads", "{0: 4}", COUNTS),
    "kv_heads over the queries": _gqa(
        "grouped", "16", "more than the 8 query heads", "16", "1, 2, 4, 8"
    ),
    "kv_heads no multiple": _gqa(
        "grouped", "6", "2 KV heads of model.layers.0.self_attn cannot be", "6", "1, 2, 4, 8"
    ),
    "kv_heads that eight devices cannot share": _gqa(
        "llama",
        "4",
        "8 devices cannot share evenly: 4 KV heads (layers 0, 1)",
        "8",
        "1, 2, 4; or multiples of 8",
        key="export.tensor_parallel",
        options="export.tensor_parallel=8",
    ),
    "kv_heads no divisor of six": _gqa("six heads", "4", "divide the 6", "4", "1, 2, 3, 6"),
    "heads that training may leave unequal, for two devices": _prune(
        "count=2 estimator=random schedule=gradual scope=global",
        f"{PRUNE}.scope",
        "training decides how many heads each layer keeps, so 2 devices",
        "global",
        "layer, uniform: true",
        more="stages=[plan,operate,train] export.tensor_parallel=2",
    ),
    "half of the heads under one KV head": _prune(
        "amount=0.5 estimator=random",
        f"{PRUNE}.amount",
        "removes nothing: 8 query heads share a KV head",
        "0.5",
        f"{PRUNE}.cut=queries",
        model="multi-query",
    ),
    "budget too large": _gqa(
        "llama",
        "{average:9}",
        "the average number of KV heads is out of range",
        "{'average': 9}",
        "1 to 8",
    ),
    "budget of none": _gqa(
        "llama",
        "{average:0.5}",
        "the average number of KV heads is out of range",
        "{'average': 0.5}",
        "1 to 8",
    ),
    "budget in words": _gqa(
        "llama", "{average:few}", "must be a number of heads", "{'average': 'few'}", COUNTS
    ),
    "optimal under a norm over all heads": _gqa(
        "olmo2",
        "4",
        "taken over all heads together",
        "optimal",
        "mean, first, random",
        options=f"{GQA}.merge=optimal",
        key=f"{GQA}.merge",
    ),
    "grouping misspelt": _gqa(
        "llama",
        "4",
        "Invalid value",
        "'similar'",
        "contiguous, similarity",
        options=f"{GQA}.grouping=similar",
        key=f"{GQA}.grouping",
    ),
    "list too short": _gqa("llama", "[4]", "has 1 numbers for 2 layers", "[4]", COUNTS),
    "list with a word": _gqa("llama", "[4,two]", "must be a number of heads", "[4, 'two']", COUNTS),
    "list for one layer": _gqa(
        "llama",
        "[4,2]",
        "has 2 numbers for 1 layers",
        "[4, 2]",
        COUNTS,
        options=f"{GQA}.layers=[1]",
    ),
    "layers in words": _gqa(
        "llama",
        "4",
        "must be a list",
        "'all'",
        "list[int]",
        options=f"{GQA}.layers=all",
        key=f"{GQA}.layers",
    ),
    "layers from behind": _gqa(
        "llama",
        "4",
        "no such layer",
        "-1",
        "0 to 1",
        options=f"{GQA}.layers=[-1]",
        key=f"{GQA}.layers",
    ),
    "layers that are linear": _gqa(
        "hybrid",
        "4",
        "no such layer",
        "1",
        "0 to 0",
        options=f"{GQA}.layers=[1]",
        key=f"{GQA}.layers",
    ),
    # gqa: models
    **(
        {
            "gqa on GPT-J": _gqa(
                "gptj", "4", "cannot share KV heads", "4 KV heads", "8: one", key=GQA
            )
        }
        if brings_own_attention("gptj")
        else {}
    ),
    "gqa on GPT-Neo": _gqa(
        "gpt_neo", "4", "GPTNeoSelfAttention has its own attention code", "4 KV heads", "8", key=GQA
    ),
    "gqa on BLOOM": _gqa("bloom", "4", "cannot share KV heads", "4 KV heads", "8", key=GQA),
    "gqa on OPT": _gqa(
        "opt",
        "4",
        "does not take 8 query and 4 KV heads",
        "8 query and 4",
        "the 8 query and 8",
        key="attention",
    ),
    "gqa on GPT-NeoX": _gqa(
        "gpt_neox",
        "4",
        "does not take 8 query and 4 KV heads",
        "8 query and 4",
        "the 8 query",
        key="attention",
    ),
    "gqa on latent attention": _gqa(
        "deepseek",
        "4",
        "none of the attention blocks of DeepseekV3ForCausalLM",
        "model.layers.0.self_attn (DeepseekV3Attention)",
        "",
        key="attention",
    ),
    "gqa on differential attention": _gqa(
        "diffllama", "4", "heads work in pairs", "model.layers.0.self_attn", "", key="attention"
    ),
    "gqa without attention": _gqa(
        "mamba",
        "4",
        "no attention was recognised",
        "MambaForCausalLM",
        "a model with attention",
        key="attention",
    ),
    # prune_heads: what is asked for
    "no way to choose": _prune(
        "scope=global", PRUNE, "exactly one of heads, amount", "none of", ""
    ),
    "amount without scores": _prune("amount=0.5", TABLE, "`amount` needs a score", "", JSON),
    "scores for named heads": _prune(
        "heads=[0] scores={good}", TABLE, "have no effect where `heads`", "{good}", "null"
    ),
    "scope for named heads": _prune(
        "heads=[0] scope=global", f"{PRUNE}.scope", "has no effect where `heads`", "global", "layer"
    ),
    "cut for named heads": _prune(
        "heads=[0] cut=queries", f"{PRUNE}.cut", "has no effect where `heads`", "queries", "groups"
    ),
    "no such head": _prune("heads=[8]", HEADS, "has no such head", "8", "0 to 7"),
    "lists by layer": _prune(
        "heads=[[1],[2]]", HEADS, "must be a list of heads", "[[1], [2]]", LISTS
    ),
    "no such layer's heads": _prune("heads={5:[0]}", HEADS, "no such layer", "5", "0, 1"),
    "heads of a layer not chosen": _prune(
        "heads={0:[1]} layers=[1]", HEADS, "no such layer", "0", "1"
    ),
    "unequal groups": _prune(
        "heads=[0]", HEADS, "unequal shares", "[0]", "whole groups of 4", model="grouped"
    ),
    "all heads": _prune(
        f"heads={EVERY}",
        HEADS,
        "all 8 heads of model.layers.0",
        "8 heads",
        f"at most 7, or {PRUNE}.remove_attention=true",
    ),
    "amount over one": _prune(
        "amount=1.5 scores={good}", f"{PRUNE}.amount", "must be in [0, 1]", "1.5", "in [0, 1]"
    ),
    "amount no number": _prune(
        "amount=nan scores={good}", f"{PRUNE}.amount", "must be finite", "nan", "in [0, 1]"
    ),
    "amount all": _prune(
        "amount=1.0 scores={good}",
        f"{PRUNE}.amount",
        "keeps at least one head",
        "1.0",
        "at most 7 heads, or",
    ),
    "count below zero": _prune(
        "count=-1 scores={good}", COUNT, "must be at least 0", "-1", "at least 0"
    ),
    "count a fraction": _prune("count=2.5 scores={good}", COUNT, "Integer", "2.5", "at least 0"),
    "count over the layer": _prune(
        "count=9 remove_attention=true scores={good}",
        COUNT,
        "not that many heads",
        "9",
        "at most 8 heads",
    ),
    "count over all layers": _prune(
        "count=15 scope=global scores={good}", COUNT, "keeps at least one", "15", "at most 14 heads"
    ),
    "count over the groups": _prune(
        "count=8 scores={good}",
        COUNT,
        "(or one group of heads)",
        "8",
        "at most 4 heads",
        model="grouped",
    ),
    # prune_heads: score tables
    "scores missing": _prune("count=2 scores={root}/no", TABLE, "cannot be read: No such", "/", ""),
    "scores not JSON": _prune("count=2 scores={not_json}", TABLE, "is not valid JSON", "/", JSON),
    "scores no table": _prune(
        "count=2 scores={no_table}", TABLE, "is not a score table", "/", JSON
    ),
    "scores, other layers": _prune(
        "count=2 scores={three_layers}", TABLE, "is for 3 layers; the model has 2", "/", JSON
    ),
    "scores, other heads": _prune(
        "count=2 scores={seven_heads}", TABLE, "7 scores for the 8 heads of layer 1", "/", JSON
    ),
    "scores not finite": _prune(
        "count=2 scores={not_finite}", TABLE, "layer 0 is not a finite number", "/", JSON
    ),
    "scores with a word": _prune(
        "count=2 scores={word}", TABLE, "layer 1 is not a finite number", "/", JSON
    ),
    # prune_heads: models
    "norm over all heads": _prune(
        "heads=[0]",
        PRUNE,
        "taken over all heads together",
        "a norm of 64",
        "a model with a norm",
        model="olmo2",
    ),
    "heads in equal blocks": _prune(
        "heads=[0]", HEADS, "in 4 equal blocks", "7 heads left", "a multiple of 4", model="codegen"
    ),
    "one position bias for all": _prune(
        "heads=[0]", "attention", "does not take 7 query", "7 query", "the 8 query", model="t5"
    ),
    "ALiBi of all heads": _prune(
        "heads=[0]", "attention", "does not take 7 query", "7 query", "the 8 query", model="bloom"
    ),
    "pruned, quantized": _prune(
        "heads=[0]", "attention", QUANTIZED, "gptq", "the model's unquantized", model="gptq"
    ),
    # rope: values
    "factor one": _rope(
        "rope_linear", "factor=1", "factor", "is not a valid value", "1.0", "a number above"
    ),
    "factor infinite": _rope("rope_linear", "factor=inf", "factor", "finite", "inf", "at least 1"),
    "factor missing": _rope("rope_yarn", "factor=null", "factor", "yarn needs it", "", "a number"),
    "factor without scaling": _rope(
        "rope", "factor=2", "factor", "does not use it", "2.0", "null; default"
    ),
    "YaRN's bounds for linear": _rope(
        "rope_linear", "beta_fast=16", "beta_fast", "does not use it", "16.0", "null; linear has"
    ),
    "theta for none": _rope("nope", "theta=500", "theta", "does not use it", "500.0", "null; none"),
    "no such type": _rope("rope", "type=ntk", "type", "ntk", "'ntk'", "default, linear"),
    "bounds crossed": _rope(
        "rope_yarn", "beta_slow=40", "beta_fast", "must be above beta_slow", "32", "32 with"
    ),
    "mscale alone": _rope("rope_yarn", "mscale=1", "mscale", "count together", "mscale", "both"),
    "wavelengths crossed": _rope(
        "rope_llama3", "high_freq_factor=1", "high_freq_factor", "above low_freq", "1.0", "4 with"
    ),
    "LongRoPE without lists": _rope(
        "rope_longrope", "", "long_factor", "longrope needs it", "", "a positive number for each"
    ),
    "LongRoPE of other width": _rope(
        "rope_longrope",
        "short_factor=[1,1] long_factor=[1,1]",
        "short_factor",
        "for each rotated pair",
        "2 numbers",
        "4 numbers",
    ),
    "LongRoPE, lists apart": _rope(
        "rope_longrope",
        "short_factor=[1,1,1,1] long_factor=[1,1]",
        "long_factor",
        "not as long as short_factor",
        "2 numbers",
        "4 numbers",
    ),
    "share that is odd": _rope(
        "rope",
        "partial_rotary_factor=0.4",
        "partial_rotary_factor",
        "3 of a head's 8",
        "0.4",
        "what makes it an even number",
    ),
    "share nobody reads": _rope(
        "rope",
        "partial_rotary_factor=0.5",
        "partial_rotary_factor",
        "LlamaRotaryEmbedding ignores it",
        "0.5",
        "null, or type proportional",
    ),
    "shorter than it was": _rope(
        "rope_linear",
        "max_position_embeddings=64",
        "max_position_embeddings",
        "shorter than the 128",
        "64",
        "128 or more",
    ),
    "dynamic and longer": _rope(
        "rope_dynamic",
        "max_position_embeddings=256",
        "max_position_embeddings",
        "so it stays the original",
        "256",
        "null, or 128",
    ),
    "other original length": _rope(
        "rope_yarn",
        "original_max_position_embeddings=64",
        "original_max_position_embeddings",
        "config holds another length",
        "64",
        "null, or 32",
        model="yarn rope",
    ),
    "scaled from who knows what": _rope(
        "rope_yarn",
        "",
        "original_max_position_embeddings",
        "does not say from what length",
        "",
        "the positions it was trained for",
        model="linear rope",
    ),
    "layer types it has not": _rope(
        "rope_linear",
        "layer_type=full_attention",
        "layer_type",
        "layers of this model share",
        "full_attention",
        "null",
    ),
    "layers and layer type": _rope(
        "rope_linear",
        "layer_type=full_attention layers=[0]",
        "layer_type",
        "has no effect where `layers`",
        "full_attention",
        "null, or layers null",
    ),
    "no such layer type": _rope(
        "rope_linear",
        "layer_type=chunked_attention",
        "layer_type",
        "no positions for such",
        "chunked_attention",
        "sliding_attention, full_attention",
        model="gemma3",
    ),
    "dynamic for one layer": _rope(
        "rope_dynamic",
        "layers=[0] original_max_position_embeddings=64",
        "layers",
        "no longer the original 64",
        "[0]",
        "null for all",
    ),
    # rope: models
    "rope on GPT-2": _rope("rope_linear", "", "", NO_ROPE, "gpt2", "a model with", model="gpt2"),
    "rope on T5": _rope("rope_yarn", "", "", NO_ROPE, "t5", "a model with", model="t5"),
    "nope on OPT": _rope("nope", "", "", NO_ROPE, "opt", "a model with", model="opt"),
    "rope beside ALiBi": _rope(
        "rope_linear", "", "", NO_ROPE, "falcon", "a model with", model="falcon alibi"
    ),
    "linear in Phi-3": _rope(
        "rope_linear", "", "type", "config does not keep it", "linear", "", model="phi3"
    ),
    # backend
    "flash without CUDA": _run("llama", "flash_attention_2", "needs CUDA", "eager, flex"),
    "no such backend": _run("llama", "flashy", "there is no such backend", "eager, flex"),
    "kernels not installed": _run(
        "llama", "kernels-community/flash-attn", "`kernels` is not installed", "eager, flex"
    ),
    "sdpa with a soft cap": _run(
        "gemma2",
        "sdpa",  # transformers says it of the class since 5.21
        "has no soft cap" if Gemma2ForCausalLM._supports_sdpa else "does not support it",
        "eager, flex",
    ),
    "flex on Falcon": _run("falcon", "flex_attention", "attention code of its own", "sdpa, fast"),
    "flex that drops": _run("dropping", "flex_attention", "drops 0.1", "eager, sdpa, fast"),
    "tolerance zero": Bad(
        "llama",
        "sdpa",
        f"{BACKEND}.tolerance=0",
        f"{BACKEND}.tolerance",
        "must be above 0",
        "0.0",
        "a number above 0, or null",
    ),
    "tolerance infinite": Bad(
        "llama",
        "sdpa",
        f"{BACKEND}.tolerance=inf",
        f"{BACKEND}.tolerance",
        "must be finite",
        "inf",
        "a number above 0, or null",
    ),
    "backend of latent attention": Bad(
        "deepseek", "sdpa", "", "attention", "DeepseekV3ForCausalLM can be", "model.layers.0", ""
    ),
    # fuse_qkv
    "kept fused in a Llama": Bad(
        "llama",
        "fuse_qkv",
        f"{FUSE}.keep=true",
        f"{FUSE}.keep",
        "has separate projections",
        "True",
        "false, or convert it first to an architecture with fused ones (phi3)",
    ),
    "kept fused in a Mistral": Bad(
        "llama",
        "rehouse,fuse_qkv",
        f"{INTO}=mistral {FUSE}.keep=true",
        f"{FUSE}.keep",
        "a MistralForCausalLM has separate projections",
        "True",
        "false, or",
    ),
    "fused across attention": Bad(
        "t5",
        "fuse_qkv",
        f"{FUSE}.layers=[3]",
        FUSE,
        "come from elsewhere",
        "layer 3",
        "layers null",
    ),
    "fused, quantized": Bad(
        "nf4", "fuse_qkv", "", "attention", QUANTIZED, "bitsandbytes", "the model's unquantized"
    ),
    # rehouse and absolute_to_rope
    "no such target": _move(
        "llama", "gpt2", "no model can be converted to this", "mistral, phi3, starcoder2"
    ),
    "target with other positions": _move("llama", "starcoder2", NO_TARGET, "mistral, phi3"),
    "target that it is": _move("mistral", "mistral", "model_type is 'mistral' already", "phi3"),
    "no way from Qwen2": _move("qwen2", "mistral", "no exact conversion", "none, for this model"),
    "biases of attention": _move("biased", "mistral", "attention_bias is True", "none, for this"),
    "biases of the MLP": _move("mlp biased", "phi3", "mlp_bias is True", "none, for this model"),
    "scaled into Phi-3": _move("yarn rope", "phi3", "only the default RoPE", "mistral"),
    "learned positions unsaid": _move(
        "gpt2",
        "starcoder2",
        "nothing replaces them",
        f"none, for this model; for learned positions: {TO_ROPE}",
    ),
    "moved, quantized": _move(
        "gptq", "mistral", "not quantized can be converted", "none, for this model"
    ),
    "Llama has no table": _to_rope("llama", "model_type is 'llama'"),
    "heads of odd width": _to_rope("gpt2 odd", "num_attention_heads is 4"),
    "scaled by layer": _to_rope("gpt2 inverse", "scale_attn_by_inverse_layer_idx is True"),
    "cross-attention": _to_rope("gpt2 cross", "add_cross_attention is True"),
    "norm behind": _to_rope("opt post-norm", "do_layer_norm_before is False"),
    "theta of new rope": Bad(
        "gpt2",
        "absolute_to_rope",
        f"{TO_ROPE}.theta=1",
        f"{TO_ROPE}.theta",
        "must be above 1",
        "1.0",
        "above 1",
    ),
    "theta for no rope": Bad(
        "gpt2",
        "absolute_to_rope",
        f"{TO_ROPE}.theta=500 {TO_ROPE}.type=none",
        f"{TO_ROPE}.theta",
        "type none does not use it",
        "500.0",
        "10000.0",
    ),
    # fit_budget
    "budget out of reach": Bad(
        "llama",
        "fit_budget",
        f"{BUDGET}.target={{kv_bytes:0.01}} {BUDGET}.choices=[gqa]",
        f"{BUDGET}.target.kv_bytes",
        "cannot be reached with these choices",
        "0.01",
        "at least",
    ),
    "budget by what does nothing": Bad(
        "llama",
        "fit_budget",
        f"{BUDGET}.target={{kv_bytes:0.5}} {BUDGET}.choices=[backend]",
        f"{BUDGET}.choices",
        "must name operations that can be searched over",
        "['backend']",
        "gqa, prune_heads",
    ),
    # attention_dropout
    "drops everything": Bad(
        "llama",
        "attention_dropout",
        f"{DROP}.p=1",
        f"{DROP}.p",
        "must be in [0, 1)",
        "1.0",
        "in [0",
    ),
    "drops null": Bad(
        "llama", "attention_dropout", f"{DROP}.p=null", f"{DROP}.p", "None", "None", "in [0, 1)"
    ),
    "CTRL drops nothing": Bad(
        "ctrl", "attention_dropout", "", DROP, "takes no attention", "MultiHeadAttention", ""
    ),
    "one dropout for all": Bad(
        "persimmon",
        "attention_dropout",
        f"{DROP}.layers=[0]",
        f"{DROP}.layers",
        "the config all blocks share",
        "[0]",
        "null for all",
    ),
    # sliding_window
    "window of one token": _window(
        "llama", "size=1", ".size", "must be at least 2", "1", "a whole number from 2 on, or null"
    ),
    "window in one layer of a Llama": _window(
        "llama",
        "size=8 layers=[1]",
        "",
        f"a llama {NO_WINDOW}; the model can be converted to mistral",
        "[1]",
        "this operation first in the list, with layers null",
    ),
    "window that no config can say": _window(
        "olmo2",
        "size=8",
        "",
        f"a olmo2 {NO_WINDOW}, and the model cannot be converted",
        "8",
        "a model whose config has `sliding_window`",
    ),
    "window where positions are for none": _window(
        "gemma3",
        "size=4096 layers=[1]",
        ".layers",
        "different rotary positions",
        "1",
        "layers of type sliding_attention",
    ),
    "windows of two sizes": _window(
        "gemma2",
        "size=8 layers=[1]",
        ".layers",
        "a gemma2 config has one window for all layers that have any",
        "windows of 8 and 4096 tokens",
        "null for all, or the size that the other layers have",
    ),
    "window taken from one layer": _window(
        "mistral",
        "size=null layers=[1]",
        ".layers",
        "a mistral config has one window for all layers",
        "[1]",
        "null for all",
    ),
    # combinations
    "window of a Llama after gqa": Bad(
        "llama",
        "gqa,sliding_window",
        f"{KV}=4 {WINDOW}.size=8",
        WINDOW,
        f"a llama {NO_WINDOW}; the model can be converted to mistral",
        "sliding_window",
        "this operation first in the list, with layers null",
    ),
    "dropout, then flex": Bad(
        "llama", "attention_dropout,flex", "", RUN, "drops 0.1", "flex_attention", "eager, sdpa"
    ),
    "flex, then dropout": Bad(
        "llama",
        "flex,attention_dropout",
        "",
        f"{DROP}.p",
        "flex_attention has no dropout",
        "0.1",
        "0, or",
    ),
    "rehouse after gqa": Bad(
        "llama",
        "gqa,rehouse",
        f"{KV}=4 {INTO}=mistral",
        REHOUSE,
        FIRST,
        "gqa, rehouse",
        "rehouse, gqa",
    ),
    "new positions after gqa": Bad(
        "gpt2",
        "gqa,absolute_to_rope",
        f"{KV}=4",
        TO_ROPE,
        FIRST,
        "gqa, absolute_to_rope",
        "absolute_to_rope, gqa",
    ),
    "two names for rope": Bad(
        "llama",
        "rope_yarn,rope_linear",
        "",
        "attention",
        "both set attention.rope",
        "[rope_yarn, rope_linear]",
        "one of them",
    ),
    "two names for gqa": Bad(
        "llama", "gqa,mqa", "", "attention", "both set attention.gqa", "[gqa, mqa]", "one of them"
    ),
    "two targets": Bad(
        "gpt2",
        "absolute_to_rope,rehouse",
        f"{INTO}=mistral",
        "attention",
        "absolute_to_rope and rehouse must both come first",
        "absolute_to_rope, rehouse",
        "only one of absolute_to_rope and rehouse",
    ),
    "five heads left": Bad(
        "six heads", "prune_heads,gqa", f"{HEADS}=[0] {KV}=3", KV, "divide the 5", "3", "1, 5"
    ),
    "a group cut": Bad(
        "llama",
        "gqa,prune_heads",
        f"{KV}=4 {HEADS}=[0]",
        HEADS,
        "unequal shares",
        "[0]",
        "whole groups of 2",
    ),
    "gqa of a GPT-2, then rope": Bad(
        "gpt2", "gqa,rope_linear", f"{KV}=4", ROPE, NO_ROPE, "gpt2", "a model with rotary"
    ),
    "gqa where attention is gone": Bad(
        "llama",
        "prune_heads,gqa",
        f"{EMPTIED}{KV}=4 {GQA}.layers=[1]",
        f"{GQA}.layers",
        "model.layers.1.self_attn is removed by an earlier operation",
        "1",
        "0",
    ),
    "rope where attention is gone": Bad(
        "llama",
        "prune_heads,rope_linear",
        f"{EMPTIED}{ROPE}.layers=[1]",
        f"{ROPE}.layers",
        "is removed by an earlier operation",
        "1",
        "0",
    ),
    "fused where attention is gone": Bad(
        "llama",
        "prune_heads,fuse_qkv",
        f"{EMPTIED}{FUSE}.layers=[1]",
        f"{FUSE}.layers",
        "is removed by an earlier operation",
        "1",
        "0",
    ),
    "dropout where attention is gone": Bad(
        "llama",
        "prune_heads,attention_dropout",
        f"{EMPTIED}{DROP}.layers=[1]",
        f"{DROP}.layers",
        "is removed by an earlier operation",
        "1",
        "0",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_places(tmp_path_factory.mktemp("combinations"))


def test_every_operation_is_refused_in_some_row() -> None:
    ours = [
        name
        for name, operation in find_operations().items()
        if operation.__module__.startswith("surgery.operations.")
    ]
    keys = [bad.key.split(".") for bad in TABLE_OF_ROWS.values()]
    assert {key[1] for key in keys if key[0] == "attention" and len(key) > 1} >= set(ours)


@pytest.mark.parametrize("name", TABLE_OF_ROWS)
def test_refused_while_planning(
    name: str, places: dict[str, Path], cli: Callable[..., object], tmp_path: Path
) -> None:
    bad = TABLE_OF_ROWS[name]
    outcome = cli(
        f"model.path={places[bad.model]}",
        f"model.task={TASKS.get(bad.model, 'causal_lm')}",
        "stages=[plan]",
        f"attention=[{bad.attention}]",
        *(_filled(option, places) for option in bad.options.split()),
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    first, *lines = outcome.err.rstrip("\n").splitlines()
    assert first.startswith(f"error: {bad.key}: ")
    assert bad.problem in first
    wanted = [("given", _filled(bad.given, places)), ("valid", bad.valid)]
    wanted = [(what, text) for what, text in wanted if text]
    assert [line.split(":")[0].strip() for line in lines] == [what for what, _ in wanted]
    for line, (what, text) in zip(lines, wanted, strict=True):
        assert line.startswith(f"  {what}: {text}")
    assert not (tmp_path / "run").exists()


def test_no_row_is_there_twice() -> None:
    asked = [(bad.model, bad.attention, bad.options) for bad in TABLE_OF_ROWS.values()]
    assert len(set(asked)) == len(asked) > 100


def _filled(text: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text
