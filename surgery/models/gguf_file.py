"""Load a model from a GGUF file by transformers, and refuse what transformers would leave out.

transformers reads most of a GGUF, and what it does not know it passes over in silence: tensors
without a place in the architecture, metadata without a field in the config, rules by which text is
split. Each of them is a wrong number later, so each is looked for here, from the file's header.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from surgery.config.hints import shorten
from surgery.console import is_terminal
from surgery.errors import ConfigError, join_lines
from surgery.models.gguf_header import GgufHeader, check_extents, read_gguf_header
from surgery.models.limits import check_fields
from surgery.models.sites import get_text_config

SUFFIX = ".gguf"
_maps: dict[tuple[Path, int, type], Mapping[str, str]] = {}
_KEY = "model.path"
_DIRECTORY = "the original model's directory or hub id"
# Metadata about the file, not about the model.
_ASIDE = {"tensor_data_layout"}
# How byte-level vocabularies split text (llama.cpp's llama-vocab.cpp); transformers has the others.
_BY_GPT2 = {"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"}
_BY_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a file that is called .gguf."""
    return str(path).lower().endswith(SUFFIX) and os.path.isfile(path)


def read_header(path: Path, given: Any) -> GgufHeader:
    """Read the header of a GGUF, once the packages that read the rest are there.

    Raises:
        ConfigError: they are not, or the file is damaged.
    """
    _check_packages(given)
    try:
        return read_gguf_header(path)
    except (OSError, ValueError, MemoryError) as error:
        raise ConfigError(
            _KEY, f"is no whole GGUF file: {join_lines(error)}", given=given, valid="a .gguf file"
        ) from None


def _check_packages(given: Any) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            _KEY,
            f"a GGUF is read by packages that are not installed: {', '.join(missing)}",
            given=given,
            valid="pip install 'attention-surgery[real]', or a model's directory",
        )


def load_gguf_config(path: Path, given: Any) -> PreTrainedConfig:
    """Load the config that the metadata of a GGUF says.

    Raises:
        ConfigError: the file is damaged, or of an architecture that transformers does not read; or
            tensors are cut short, or in a quantization that cannot be read.
    """
    header = read_header(path, given)
    prefix = f"{header.architecture}."
    stated = {k.removeprefix(prefix): v for k, v in header.fields.items() if k.startswith(prefix)}
    check_fields(stated, _KEY, given)
    _check_data(header, given)  # the reader of the config looks at it
    status = path.stat()
    try:
        config = _load_config_once(path, status.st_mtime_ns, status.st_size)
    except Exception as error:  # whatever its reader stumbles over
        raise ConfigError(
            _KEY,
            f"no usable config in the GGUF: {join_lines(error)}",
            given=given,
            valid=f"a GGUF that transformers reads, or {_DIRECTORY}",
        ) from None
    check_fields(config.to_dict(), _KEY, given)
    return copy.deepcopy(config)


@lru_cache(maxsize=4)
def _load_config_once(path: Path, changed: int, size: int) -> PreTrainedConfig:
    with _isolate(path) as (folder, file):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=file)
    # The loader's notes on where it read.
    for name in ("_model_name_or_path", "unk_token_id"):
        vars(config).pop(name, None)
    config.name_or_path = ""
    return config


@contextmanager
def _isolate(path: Path) -> Iterator[tuple[str, str]]:
    """Show a file alone in a directory: loaders would also read others that lie beside it."""
    with TemporaryDirectory() as folder:
        alone = Path(folder) / f"model{SUFFIX}"
        alone.symlink_to(path.resolve())
        yield folder, str(alone)


@contextmanager
def _hide_progress() -> Iterator[None]:
    """Keep the reader's progress bar out of a log; it knows no switch."""
    with nullcontext() if is_terminal() else redirect_stderr(StringIO()):
        yield


def check_gguf(path: Path, model: PreTrainedModel, given: Any, *, whole: bool) -> None:
    """Check that all of a GGUF has its place in a model, and is what the model needs.

    Args:
        model: on the meta device, as `load_gguf_config` describes it.
        whole: whether the model's head must be in the file, and the file's in the model.

    Raises:
        ConfigError: tensors are without a place, missing, or of another size; or the metadata says
            what the config does not.
    """
    header = read_header(path, given)
    problem = _find_unread_field(header, model.config) or _find_misplaced(path, model, whole)
    if problem is not None:
        raise ConfigError(
            _KEY,
            f"transformers cannot load all of this GGUF: {problem}",
            given=given,
            valid=_DIRECTORY,
        )


def _check_data(header: GgufHeader, given: Any) -> None:
    gguf: Any = import_module("gguf")  # of the extra `real`

    def find_block(kind: int) -> tuple[int, int] | None:
        try:
            return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            return None

    problem = check_extents(header, find_block)
    if problem is not None:
        raise ConfigError(_KEY, problem, given=given, valid="a whole .gguf file")
    for kind in sorted({tensor.ggml_type for tensor in header.tensors.values()}):
        quantization = gguf.GGMLQuantizationType(kind)
        _, size = gguf.GGML_QUANT_SIZES[quantization]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), quantization)
        except NotImplementedError:
            name = next(n for n, tensor in header.tensors.items() if tensor.ggml_type == kind)
            raise ConfigError(
                _KEY,
                f"{name} is quantized as {quantization.name}, which cannot be read",
                given=given,
                valid="a GGUF of F32, F16, BF16, Q8_0 or another type that the package gguf "
                "dequantizes",
            ) from None


def _find_unread_field(header: GgufHeader, config: PreTrainedConfig) -> str | None:
    """Find metadata of the architecture that its config does not hold."""
    read = _list_read_fields(header, config)
    if read is None:
        return None
    for key, value in header.fields.items():
        name = key.removeprefix(f"{header.architecture}.")
        if name in (key, *_ASIDE) or name in read:
            continue
        if value in (False, 0, "none", "") or _holds(config, name, value):
            continue
        return f"it says {name}={shorten(value)}, which is not read"
    return None


def _list_read_fields(header: GgufHeader, config: PreTrainedConfig) -> set[str] | None:
    """List the metadata that transformers reads; ``None`` where it has another reader for it."""
    tables: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    names = (header.architecture, header.architecture.replace("-", "_"), config.model_type)
    found = [tables[name] for name in names if name in tables]
    if not found or _has_own_reader(header):
        return None
    return {name for table in found for name, field in table.items() if field is not None}


def _has_own_reader(header: GgufHeader) -> bool:
    return header.architecture in GGUF_CONFIG_ARCHS


def _holds(config: PreTrainedConfig, name: str, value: Any) -> bool:
    """Whether a config says the same as a field that is not read into it."""
    text: Any = get_text_config(config)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    rope = getattr(text, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1
    known = {
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * share),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.factor": 1,
    }
    held = known.get(name, getattr(text, name.rpartition(".")[2], None))
    if isinstance(held, (int, float)) and isinstance(value, (int, float)):
        return isclose(held, value, rel_tol=1e-6)
    return bool(held == value)


def _find_misplaced(path: Path, model: PreTrainedModel, whole: bool) -> str | None:
    """Find a tensor of the file without a place, or of the model that the file does not fill."""
    header = read_gguf_header(path)
    if _has_own_reader(header):
        return None
    places = _map_tensors(path, model)
    filled: dict[str, int] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, tensor in header.tensors.items():
        if name not in places:
            if whole or not name.startswith("output."):
                return f"there is no place for its {name}"
            continue
        filled[places[name]] = filled.get(places[name], 0) + int(
            np.prod(tensor.shape, dtype=object)
        )
        shapes.setdefault(places[name], []).append(tensor.shape)
    by_tensor: dict[int, list[str]] = {}
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in wanted.items():
        by_tensor.setdefault(id(parameter), []).append(name)
    for names in by_tensor.values():
        there = [name for name in names if name in filled]
        body = names[0].startswith(f"{model.base_model_prefix}.")
        if not there and (whole or body):
            return f"{names[0]} is missing"
        for name in there:
            if filled[name] != wanted[name].numel():
                stored = [list(shape) for shape in shapes[name]]
                stated = stored[0] if len(stored) == 1 else stored
                return f"{name} is {stated}, but should be {list(wanted[name].shape)}"
    return None


def _map_tensors(path: Path, model: PreTrainedModel) -> Mapping[str, str]:
    """Map the names of a GGUF to those of a model, as transformers does; slow, so done once."""
    key = (path, path.stat().st_mtime_ns, type(model))
    if key not in _maps:
        architecture = read_gguf_header(path).architecture
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        _maps.clear()
        _maps[key] = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    return _maps[key]


def load_gguf_model(
    path: Path, auto: Any, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load the dequantized weights into a model that holds no trace of the GGUF.

    Args:
        auto: transformers' auto class of the task.
        options: of `from_pretrained`; `dtype` is that of the result.

    Returns:
        The model, and what `from_pretrained` reports of missing and unexpected tensors.
    """
    # Without it, they would be kept packed where a kernel for them is found.
    loading = {**options, "quantization_config": GgufConfig(dequantize=True)}
    with _isolate(path) as (folder, file), _hide_progress():
        loaded, report = auto.from_pretrained(
            folder,
            gguf_file=file,
            config=copy.deepcopy(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **loading,
        )
    options["dtype"] = loaded.dtype
    model = type(loaded).from_pretrained(
        None, config=copy.deepcopy(config), state_dict=loaded.state_dict(), **options
    )
    return model, report


def load_gguf_tokenizer(path: Path, given: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF, with the rule by which it splits text.

    Raises:
        ConfigError: the rule is not known, so that texts would become other tokens.
    """
    header = read_header(path, given)
    with _isolate(path) as (folder, file):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.name_or_path = str(path)
    if header.fields.get("tokenizer.ggml.model") == "gpt2":
        _set_split_(tokenizer, header.fields.get("tokenizer.ggml.pre"), given)
    count = header.fields.get("tokenizer.ggml.tokens", 0)
    return tokenizer if len(tokenizer) <= count else _drop_made_up(tokenizer, count)


def _drop_made_up(tokenizer: Any, count: int) -> PreTrainedTokenizerBase:
    """Drop tokens beyond the file's: defaults of a tokenizer's class, which nothing embeds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    special["unk_token"] = tokenizer.unk_token
    kept = {n: text for n, text in special.items() if (tokenizer.vocab.get(text) or 0) < count}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        name_or_path=tokenizer.name_or_path,
        **kept,
    )


def _set_split_(tokenizer: Any, rule: Any, given: Any) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in _BY_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif rule in _BY_GPT2:
        tokenizer.backend_tokenizer.pre_tokenizer = words
    elif rule not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ConfigError(
            "model.tokenizer",
            f"the GGUF splits text by the rule {shorten(rule)}, which transformers does not know",
            given=given,
            valid="a directory or hub id with the original's tokenizer",
        )
