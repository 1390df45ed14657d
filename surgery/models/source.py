"""Finding a model: its config first, its weights only when somebody needs them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
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

from surgery.config.schema import ModelConfig, Task
from surgery.errors import ConfigError

EMBEDDED = "embedded"
BYTES = "bytes"

_AUTO: dict[Task, Any] = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.masked_lm: AutoModelForMaskedLM,
    Task.sequence_classification: AutoModelForSequenceClassification,
}


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
        path = self.spec.path
        if path is None:
            raise ConfigError(
                "model.path",
                "no model is named",
                valid="embedded, a local directory, a hub id, or model.scratch for random weights",
            )
        if path == EMBEDDED:
            return str(embedded_dir())
        local = Path(path).expanduser()
        if local.is_dir():
            return str(local)
        if local.exists():
            raise ConfigError("model.path", "is a file, not a model directory", given=path)
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise ConfigError(
                "model.path",
                "there is no such directory",
                given=path,
                valid="embedded, an existing directory with a config.json, or a hub id owner/name",
            )
        return path

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
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                "model.path", f"no usable config: {_first_line(error)}", given=self.spec.path
            ) from None
        if self.spec.num_labels is not None:
            config.num_labels = self.spec.num_labels
        return config

    def _scratch_config(self, fields: dict[str, Any]) -> PreTrainedConfig:
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ConfigError("model.scratch.model_type", "a value is required here",
                              valid="a model type of transformers, e.g. llama")
        if "vocab_size" not in fields:
            tokenizer = self.tokenizer()
            fields["vocab_size"] = len(tokenizer)
            fields.setdefault("pad_token_id", tokenizer.pad_token_id)
            fields.setdefault("eos_token_id", tokenizer.eos_token_id)
            fields.setdefault("bos_token_id", tokenizer.bos_token_id)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                "model.scratch", _first_line(error), given=self.spec.scratch
            ) from None

    def skeleton(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """The module tree on the meta device: every shape, no byte of weights.

        Raises:
            ConfigError: the architecture has no class for `model.task`.
        """
        config = config if config is not None else self.config()
        with torch.device("meta"):
            return build(config, self.spec.task, trust_remote_code=self.spec.trust_remote_code)

    def check_weights(self) -> None:
        """Refuse, before any work, a directory that holds no safetensors.

        Raises:
            ConfigError: no weights, or only pickled ones.
        """
        if self.spec.scratch is not None:
            return
        where = Path(self.location())
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
        if self.spec.scratch is not None:
            model = build(self.config(), self.spec.task)
            return model.to(getattr(torch, self.spec.dtype.value)).eval()
        self.check_weights()
        try:
            model = _AUTO[self.spec.task].from_pretrained(
                self.location(),
                config=self.config(),
                revision=self.spec.revision,
                dtype=self.spec.dtype.value,
                attn_implementation=self.spec.attn_implementation,
                trust_remote_code=self.spec.trust_remote_code,
                use_safetensors=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                "model.path", f"cannot be loaded: {_first_line(error)}", given=self.spec.path
            ) from None
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model, or the one `model.tokenizer` names.

        Raises:
            ConfigError: there is none.
        """
        where = self.spec.tokenizer
        if where == BYTES:
            return byte_tokenizer()
        if where is None:
            where = self.location()
        try:
            return AutoTokenizer.from_pretrained(
                where,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "model.tokenizer",
                f"no tokenizer could be loaded: {_first_line(error)}",
                given=self.spec.tokenizer or self.spec.path,
                valid="a directory or hub id with a tokenizer, or `bytes`",
            ) from None


def build(
    config: PreTrainedConfig,
    task: Task,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of `task` with fresh weights, in the default dtype, on the current device."""
    try:
        return _AUTO[task].from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(
            "model.task",
            f"{config.model_type} has no such model: {_first_line(error)}",
            given=task.value,
        ) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
