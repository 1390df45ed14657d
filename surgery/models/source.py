"""Load models: the embedded one, a directory, a hub id, or random weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
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

from surgery.config.schema import Dtype, ModelConfig, Task
from surgery.console import say
from surgery.errors import ConfigError
from surgery.models.headers import find_header_misfit
from surgery.models.own_record import find_record, is_own_record

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
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
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
        """Return a directory that exists, or a hub id.

        Raises:
            ConfigError: the path does not exist, or none is given.
        """
        if self.spec.path is None:
            raise ConfigError(
                "model.path",
                "no model is named",
                valid="embedded, a local directory, a hub id, or model.scratch for random weights",
            )
        path = self.spec.path
        where = str(find_embedded_dir()) if path == EMBEDDED else _locate("model.path", path)
        if self.spec.revision is not None and Path(where).is_dir():
            raise ConfigError(
                "model.revision",
                "only models of the hub have revisions, not local directories",
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
        if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
            raise ConfigError(
                "model.path", "the directory has no config.json", given=self.spec.path
            )
        try:
            config = AutoConfig.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except _BAD_CONFIG as error:
            raise ConfigError(
                "model.path",
                f"no usable config: {_format_error(error)}",
                given=self.spec.path,
                valid="embedded, an existing directory, or a hub id that can be reached",
            ) from None
        if self.spec.num_labels is not None:
            config.num_labels = self.spec.num_labels
        return config

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
        if "vocab_size" not in fields:
            tokenizer = self.load_tokenizer()
            fields["vocab_size"] = len(tokenizer)
            fields.setdefault("pad_token_id", tokenizer.pad_token_id)
            fields.setdefault("eos_token_id", tokenizer.eos_token_id)
            fields.setdefault("bos_token_id", tokenizer.bos_token_id)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except _BAD_CONFIG as error:
            raise ConfigError(
                "model.scratch", _format_error(error), given=self.spec.scratch
            ) from None

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
        with torch.device("meta"):
            return build_model(
                config, self.spec.task, trust_remote_code=self.spec.trust_remote_code
            )

    def check_shapes(self, model: PreTrainedModel) -> None:
        """Check by the headers of local weights that they have the heads that `model` has.

        Args:
            model: as the config describes it, on the meta device.

        Raises:
            ConfigError: they have not, or the config says that heads were pruned.
        """
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
            ConfigError: the directory has no weights, or only pickled ones; or the model or the
                machine does not have the attention implementation.
        """
        if self.spec.scratch is None:
            self._check_files(Path(self.locate()))
        config, implementation = self.load_config(), self.spec.attn_implementation
        self.build_meta_model(config)  # any error here is not about the attention implementation
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
                _format_error(error),
                given=implementation,
                valid=f"{', '.join(others)}, or another one that this model and machine have; "
                "null: any",
            ) from None

    def _check_files(self, where: Path) -> None:
        if not where.is_dir() or any(where.glob("*.safetensors")):
            return
        pickled = sorted(where.glob("*.bin")) + sorted(where.glob("*.pt"))
        problem = "the directory has no weights"
        if pickled:
            problem = f"has only pickled weights ({pickled[0].name}), which are never loaded"
        raise ConfigError(
            "model.path", problem, given=self.spec.path, valid="a directory with *.safetensors"
        )

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
            model, report = _AUTO[self.spec.task].from_pretrained(
                self.locate(),
                config=config,
                revision=self.spec.revision,
                dtype=self.spec.dtype.value,
                attn_implementation=self.spec.attn_implementation,
                trust_remote_code=self.spec.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_find_misfit` explains them better
                output_loading_info=True,
            )
        except (*_BAD_CONFIG, SafetensorError) as error:
            raise ConfigError(
                "model.path", f"cannot be loaded: {_format_error(error)}", given=self.spec.path
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

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer beside the model, or the one that `model.tokenizer` names.

        Raises:
            ConfigError: there is none.
        """
        named, path = self.spec.tokenizer, self.spec.tokenizer or self.spec.path
        if named == BYTES:
            return make_byte_tokenizer()
        where = _locate("model.tokenizer", named) if named is not None else self.locate()
        valid = "a directory or hub id with a tokenizer, or `bytes`"
        local = Path(where)
        if local.is_dir() and not any(any(local.glob(name)) for name in _TOKENIZER_FILES):
            raise ConfigError(
                "model.tokenizer", "the directory has no tokenizer", given=path, valid=valid
            )
        try:
            return AutoTokenizer.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except _BAD_CONFIG as error:
            raise ConfigError(
                "model.tokenizer",
                f"cannot be loaded: {_format_error(error)}",
                given=path,
                valid=valid,
            ) from None


def build_model(
    config: PreTrainedConfig,
    task: Task,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a model of `task` with new weights, in the default dtype, on the current device.

    If the config has a record, the model gets the structure of the record.

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
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except _BAD_CONFIG as error:
        raise ConfigError(
            "model", f"no {config.model_type} can be built from this config: {_format_error(error)}"
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
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.exists():
        raise ConfigError(key, "is a file, not a model directory", given=path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            key,
            "there is no such directory",
            given=path,
            valid="an existing directory, or a hub id owner/name"
            + (", or embedded" if key == "model.path" else ", or bytes"),
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


def _format_error(error: BaseException) -> str:
    """Format the text of an error in one line."""
    return " ".join(str(error).split()).rstrip(":") or type(error).__name__
