"""Text that the original model itself says, in place of its own kind of text: `data=self`.

LLM-QAT (arXiv:2305.17888) trains on such text, and comes closer to the original on it than on real
text of another kind. Samples are kept in the cache of this project, in shards, so a run that was
ended goes on where it was, and later runs read what there is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, SelfConfig, Task
from surgery.console import say, track_progress
from surgery.data import openings, sampling
from surgery.data.cache import hash_tokenizer
from surgery.data.openings import GREEDY_TOKENS, VOCABULARY, make_openings
from surgery.data.sampling import Sampling, sample_windows
from surgery.errors import ConfigError, SurgeryError
from surgery.files import CACHE_VARIABLE, find_cache_folder, write_json, write_whole
from surgery.models.probe import get_vocabulary_size

FOLDER = "samples"
_NAMES = ("input_ids", "position_ids")


class OwnText:
    """Samples of one original, as `data.self` describes them.

    Args:
        cfg: `data.*` with `data.self`.
        tokenizer: the model's.
        config: of the original.
        task: of the run.
        scratch: whether the original has random weights.

    Raises:
        ConfigError: such samples cannot be drawn or used.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        task: Task,
        *,
        scratch: bool = False,
    ) -> None:
        assert cfg.self is not None
        self.cfg, self.options = cfg, cfg.self
        self.tokenizer = tokenizer
        _check_use(cfg, task, config, scratch=scratch)
        vocabulary = get_vocabulary_size(config)
        self.openings = make_openings(self.options.prompts, tokenizer, vocabulary, cfg.seq_len)
        greedy = self.options.greedy_tokens
        if greedy is None:
            greedy = GREEDY_TOKENS if self.openings.kind == VOCABULARY else 0
        self.greedy_tokens = greedy
        self.held_out = 0 if cfg.val_path is not None else _count_held_out(cfg, self.options)
        if self.held_out == self.options.windows:
            raise ConfigError(
                "data.val_fraction",
                "leaves no window to train on",
                given=cfg.val_fraction,
                valid="a smaller share, or more data.self.windows",
            )

    @property
    def train(self) -> int:
        """Number of windows that are not held out."""
        return self.options.windows - self.held_out

    @property
    def description(self) -> str:
        """What is sampled, in words."""
        options, kind = self.options, self.openings.kind
        prompts = f"{len(self.openings.choices)} {kind}" if kind == openings.TEXTS else kind
        top_p = f", top_p {options.top_p:g}" if options.top_p < 1 else ""
        greedy = f", first {self.greedy_tokens} tokens greedy" if self.greedy_tokens else ""
        return (
            f"samples of the original: {options.windows} windows of {self.cfg.seq_len} tokens, "
            f"temperature {options.temperature:g}{top_p}{greedy}, prompts {prompts}, "
            f"seed {options.seed}"
        )

    def load_rows(self, model: PreTrainedModel) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Load the rows to train on, and those held out; sample what is not in the cache.

        Args:
            model: the original.

        Raises:
            ConfigError: it cannot be sampled from.
        """
        shards = list(self._load_shards(model))
        columns = {
            name: torch.cat([shard[name] for shard in shards])[: self.options.windows].numpy()
            for name in _NAMES
        }
        if not self.cfg.isolate_documents:
            del columns["position_ids"]
        # All windows are drawn alike, so the last ones are as good as any.
        parts = (slice(self.train), slice(self.train, None))
        train, held_out = (
            datasets.Dataset.from_dict({name: list(rows[part]) for name, rows in columns.items()})
            for part in parts
        )
        return train, held_out

    def _load_shards(self, model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
        size, length = self.options.batch_size, self.cfg.seq_len
        count = -(-self.options.windows // size)
        chosen = Sampling(
            self.options.temperature,
            self.options.top_p,
            self.greedy_tokens,
            _find_ends(model, self.tokenizer),
        )
        about = self._describe_work(model, chosen)
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        folder = find_cache_folder() / FOLDER / key
        folder.mkdir(parents=True, exist_ok=True)
        # Another process that wants the same samples waits, and then finds them.
        with WeakFileLock(folder / "lock"):
            write_json(folder / "about.json", about)
            files = [folder / f"{number:05d}.safetensors" for number in range(count)]
            found = {file: self._read_shard(file) for file in files}
            absent = [file for file in files if found[file] is None]
            if not absent:
                say(f"  {count * size * length:,} sampled tokens of an earlier run: {folder}")
            else:
                say(f"  samples are kept in {folder}")
                with track_progress("samples of the original", count * length) as steps:
                    steps.advance((count - len(absent)) * length)
                    for number, file in enumerate(files):
                        if found[file] is None:
                            found[file] = self._sample_shard(
                                model, chosen, number, file, steps.advance
                            )
        for file in files:
            shard = found[file]
            assert shard is not None
            yield shard

    def _sample_shard(
        self,
        model: PreTrainedModel,
        chosen: Sampling,
        number: int,
        file: Path,
        advance: Callable[[], None],
    ) -> dict[str, torch.Tensor]:
        ids, positions = sample_windows(
            model,
            self.openings,
            chosen,
            rows=self.options.batch_size,
            length=self.cfg.seq_len,
            seed=self.options.seed * 1_000_003 + number,
            advance=advance,
        )
        shard = dict(zip(_NAMES, (ids, positions), strict=True))
        with write_whole(file) as draft:
            save_file(shard, draft)
        return shard

    def _read_shard(self, file: Path) -> dict[str, torch.Tensor] | None:
        if not file.is_file():
            return None
        shape = (self.options.batch_size, self.cfg.seq_len)
        try:
            shard = load_file(file)
            whole = all(tuple(shard[name].shape) == shape for name in _NAMES)
        except (SafetensorError, OSError, KeyError):
            whole = False
        if not whole:
            say(f"  {file} is damaged, and is sampled again")
            return None
        return shard

    def _describe_work(self, model: PreTrainedModel, chosen: Sampling) -> dict[str, Any]:
        """Describe everything that the samples follow from, but the number of windows."""
        code = (Path(str(module.__file__)) for module in (openings, sampling))
        return {
            "model": hash_model(model),
            "tokenizer": hash_tokenizer(self.tokenizer),
            "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
            "seq_len": self.cfg.seq_len,
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "greedy_tokens": chosen.greedy_tokens,
            "ends": sorted(chosen.ends),
            "prompts": self.openings.kind,
            "openings": hashlib.sha256(
                json.dumps(
                    [list(map(list, self.openings.choices)), list(self.openings.answer)]
                ).encode()
            ).hexdigest(),
        }


def check_cache() -> None:
    """Check that samples can be kept.

    Raises:
        SurgeryError: they cannot.
    """
    folder = find_cache_folder() / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise SurgeryError(
            f"{folder}: samples of the original cannot be kept there; the environment variable "
            f"{CACHE_VARIABLE} names another folder"
        )


def _check_use(cfg: DataConfig, task: Task, config: PreTrainedConfig, *, scratch: bool) -> None:
    if task is not Task.causal_lm:
        raise ConfigError(
            "data",
            f"only a causal model can be sampled from, and model.task is {task.value}",
            given="self",
            valid="data=text, hub or stdlib",
        )
    if scratch:
        raise ConfigError(
            "data",
            "a model with random weights has nothing to say",
            given="self",
            valid="data=text, hub or stdlib; or a model.path",
        )
    if cfg.layout is not Layout.packed:
        raise ConfigError(
            "data.layout", "samples fill whole windows", given=cfg.layout.value, valid="packed"
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and cfg.seq_len > limit:
        raise ConfigError(
            "data.seq_len",
            "is more than the original has positions, and it is sampled as it is",
            given=cfg.seq_len,
            valid=f"2 to {limit}, or longer text by data=text",
        )


def _find_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Find the tokens that end a text: of the tokenizer, the config and the generation config."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        found = getattr(config, "eos_token_id", None)
        ends.update(found if isinstance(found, list | tuple) else [found])
    return frozenset(int(end) for end in ends if end is not None)


def _count_held_out(cfg: DataConfig, options: SelfConfig) -> int:
    """Count the held-out windows: of any share at least one."""
    if cfg.val_fraction == 0:
        return 0
    return max(1, round(cfg.val_fraction * options.windows))


def hash_model(model: PreTrainedModel) -> str:
    """Hash the config, and the name, type and content of every parameter and saved buffer."""
    fields = model.config.to_dict()
    kept = {k: v for k, v in fields.items() if not k.startswith("_") and "version" not in k}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
