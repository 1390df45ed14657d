"""Finding a model: its config first, its weights only when somebody needs them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
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

from surgery.config.schema import Dtype, ModelConfig, Task
from surgery.console import say
from surgery.errors import ConfigError
from surgery.models.rebuild import rebuild_recorded

EMBEDDED = "embedded"
BYTES = "bytes"

_AUTO: dict[Task, Any] = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.masked_lm: AutoModelForMaskedLM,
    Task.sequence_classification: AutoModelForSequenceClassification,
}
# What transformers raises for a config that cannot be: no single base class covers it.
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


def byte_tokenizer() -> ByT5Tokenizer:
    """transformers' own byte tokenizer: token id = byte + 3, after pad, eos and unk."""
    return ByT5Tokenizer(extra_ids=0)


def embedded_dir() -> Path:
    """The model that ships with the package."""
    return Path(str(files("surgery.models") / EMBEDDED))


@dataclass(frozen=True)
class ModelSource:
    """One original model, as `model.*` names it. Nothing is read until asked for."""

    spec: ModelConfig

    @property
    def name(self) -> str:
        """What to call it in a plan, a card and a dashboard."""
        if self.spec.scratch is not None:
            return f"{self.spec.scratch.get('model_type', 'model')} (random weights)"
        return str(self.spec.path)

    def location(self) -> str:
        """A directory that exists, or a hub id.

        Raises:
            ConfigError: a path that is not there, or no path at all.
        """
        if self.spec.path is None:
            raise ConfigError(
                "model.path",
                "no model is named",
                valid="embedded, a local directory, a hub id, or model.scratch for random weights",
            )
        path = self.spec.path
        where = str(embedded_dir()) if path == EMBEDDED else _located("model.path", path)
        if self.spec.revision is not None and Path(where).is_dir():
            raise ConfigError(
                "model.revision",
                "revisions are the hub's; a local directory has none",
                given=self.spec.revision,
                valid="null",
            )
        return where

    def config(self) -> PreTrainedConfig:
        """The architecture's config.

        Raises:
            ConfigError: it cannot be found, read, or understood.
        """
        if self.spec.scratch is not None:
            return self._scratch_config(dict(self.spec.scratch))
        where = self.location()
        if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
            raise ConfigError(
                "model.path", "the directory holds no config.json", given=self.spec.path
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
                f"no usable config: {_text(error)}",
                given=self.spec.path,
                valid="embedded, an existing directory, or a hub id that can be reached",
            ) from None
        if self.spec.num_labels is not None:
            config.num_labels = self.spec.num_labels
        return config

    def _scratch_config(self, fields: dict[str, Any]) -> PreTrainedConfig:
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
            tokenizer = self.tokenizer()
            fields["vocab_size"] = len(tokenizer)
            fields.setdefault("pad_token_id", tokenizer.pad_token_id)
            fields.setdefault("eos_token_id", tokenizer.eos_token_id)
            fields.setdefault("bos_token_id", tokenizer.bos_token_id)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except _BAD_CONFIG as error:
            raise ConfigError("model.scratch", _text(error), given=self.spec.scratch) from None

    @staticmethod
    def _check_scratch_keys(model_type: str, fields: Mapping[str, Any]) -> None:
        """transformers keeps an unknown key as an attribute, and uses the default in its place."""
        try:
            default = CONFIG_MAPPING[model_type]()
            unknown = [name for name in fields if not hasattr(default, name)]
        except _BAD_CONFIG:
            return  # this one cannot stand on its defaults, so they tell nothing
        for name in unknown:
            close = difflib.get_close_matches(name, list(default.to_dict()))
            raise ConfigError(
                f"model.scratch.{name}",
                f"no such key in a {model_type} config",
                valid=close or f"the fields of {type(default).__name__}",
            )

    def skeleton(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """The module tree on the meta device: every shape, no byte of weights.

        Raises:
            ConfigError: the architecture has no class for `model.task`, or cannot be built.
        """
        config = config if config is not None else self.config()
        with torch.device("meta"):
            return build(config, self.spec.task, trust_remote_code=self.spec.trust_remote_code)

    def check_weights(self) -> None:
        """Refuse, before any work, what could not be loaded or run as asked.

        Raises:
            ConfigError: no weights in the directory, or only pickled ones; or an attention
                implementation that the model or the machine does not have.
        """
        if self.spec.scratch is None:
            self._check_files(Path(self.location()))
        config, implementation = self.config(), self.spec.attn_implementation
        self.skeleton(config)  # so that what it refuses is not mistaken for the other below
        try:
            with torch.device("meta"):
                _AUTO[self.spec.task].from_config(
                    config,
                    trust_remote_code=self.spec.trust_remote_code,
                    attn_implementation=implementation,
                )
        except (ValueError, ImportError) as error:
            raise ConfigError(
                "model.attn_implementation",
                _text(error),
                given=implementation,
                valid="eager, sdpa, or what else this model and machine have; null leaves it open",
            ) from None

    def _check_files(self, where: Path) -> None:
        if not where.is_dir() or any(where.glob("*.safetensors")):
            return
        pickled = sorted(where.glob("*.bin")) + sorted(where.glob("*.pt"))
        problem = "the directory holds no weights"
        if pickled:
            problem = f"only pickled weights here ({pickled[0].name}), which are never loaded"
        raise ConfigError(
            "model.path", problem, given=self.spec.path, valid="a directory with *.safetensors"
        )

    def load(self) -> PreTrainedModel:
        """The original with its weights, on the CPU, in eval mode.

        Raises:
            ConfigError: the weights cannot be had or do not fit the config.
        """
        self.check_weights()
        config = self.config()
        if self.spec.scratch is not None:
            options: dict[str, Any] = {"attn_implementation": self.spec.attn_implementation}
            if self.spec.dtype is not Dtype.auto:
                # Built in it, not cast to it: a cast would round RoPE's frequencies too.
                options["dtype"] = getattr(torch, self.spec.dtype.value)
            model: PreTrainedModel = _AUTO[self.spec.task].from_config(config, **options)
            return model.eval()
        try:
            model, report = _AUTO[self.spec.task].from_pretrained(
                self.location(),
                config=config,
                revision=self.spec.revision,
                dtype=self.spec.dtype.value,
                attn_implementation=self.spec.attn_implementation,
                trust_remote_code=self.spec.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_misfit` says it better
                output_loading_info=True,
            )
        except (*_BAD_CONFIG, SafetensorError) as error:
            raise ConfigError(
                "model.path", f"cannot be loaded: {_text(error)}", given=self.spec.path
            ) from None
        misfit = _misfit(report, model, self.spec.task)
        if misfit is not None:
            raise ConfigError(
                "model.path", f"the weights do not fit the config: {misfit}", given=self.spec.path
            )
        if report["missing_keys"]:
            say(f"  not in the checkpoint, so random: {', '.join(sorted(report['missing_keys']))}")
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model, or the one `model.tokenizer` names.

        Raises:
            ConfigError: there is none.
        """
        named, path = self.spec.tokenizer, self.spec.tokenizer or self.spec.path
        if named == BYTES:
            return byte_tokenizer()
        where = _located("model.tokenizer", named) if named is not None else self.location()
        valid = "a directory or hub id with a tokenizer, or `bytes`"
        local = Path(where)
        if local.is_dir() and not any(any(local.glob(name)) for name in _TOKENIZER_FILES):
            raise ConfigError(
                "model.tokenizer", "the directory holds no tokenizer", given=path, valid=valid
            )
        try:
            return AutoTokenizer.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except _BAD_CONFIG as error:
            raise ConfigError(
                "model.tokenizer", f"cannot be loaded: {_text(error)}", given=path, valid=valid
            ) from None


def build(
    config: PreTrainedConfig,
    task: Task,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of `task` with fresh weights, in the default dtype, on the current device.

    Its structure is the record's, where the config holds one.

    Raises:
        ConfigError: the architecture has no class for `task`, or its code refuses the config.
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
            "model", f"no {config.model_type} can be built from this config: {_text(error)}"
        ) from None
    rebuild_recorded(model)
    return model


def _located(key: str, path: str) -> str:
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


def _misfit(report: Mapping[str, Any], model: PreTrainedModel, task: Task) -> str | None:
    """The first tensor that transformers made up or left out, though the config speaks of it."""
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        return f"{name} is {list(stored)}, and should be {list(wanted)}"
    for name in sorted(report["missing_keys"]):
        # A new task's head is trained from nothing; `load` says so.
        if task is Task.causal_lm or name.startswith(f"{model.base_model_prefix}."):
            return f"{name} is missing"
    for name in sorted(report["unexpected_keys"]):
        if re.search(r"\.\d+\.", name):  # in a numbered layer; heads of other tasks are in none
            return f"there is no {name} in this architecture"
    return None


def _text(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()).rstrip(":") or type(error).__name__
