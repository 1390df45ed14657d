"""The Lightning data module: training batches that resume, and a fixed held-out set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import pytorch_lightning as pl
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, Task
from surgery.data.collate import Batch, collator
from surgery.data.sampler import ResumableSampler
from surgery.data.sources import Documents, load_corpus
from surgery.data.windows import to_windows
from surgery.errors import ConfigError


class TextData(pl.LightningDataModule):
    """Batches for one model from one corpus.

    Args:
        cfg: `data.*`.
        tokenizer: the model's.
        task: decides labels, special tokens and masking.
        seed: decides the order of training windows and the choice of held-out ones.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.task = task
        self.seed = seed
        self._collate = collator(tokenizer, cfg, task)
        self._train: Documents | None = None
        self._held_out: datasets.Dataset | None = None
        self._resume = {"epoch": 0, "batches": 0}

    def setup(self, stage: str | None = None) -> None:
        """Read, split, tokenize; once, whoever calls first.

        Raises:
            ConfigError: data that is missing, empty, or shorter than one window.
        """
        if self._train is not None:
            return
        if self.cfg.layout is Layout.packed and self.task is not Task.causal_lm:
            raise ConfigError(
                "data.layout",
                "packed windows are for causal_lm: other tasks attend both ways",
                given="packed",
                valid="padded",
            )
        corpus = load_corpus(self.cfg, self.task)
        train = to_windows(corpus.train, self.tokenizer, self.cfg, self.task)
        held_out = to_windows(corpus.held_out, self.tokenizer, self.cfg, self.task)
        if isinstance(train, datasets.Dataset):
            self._refuse_empty(train, "train")
        self._train = train
        self._held_out = self._fixed_held_out(held_out)

    def _refuse_empty(self, rows: datasets.Dataset, half: str) -> None:
        if len(rows) > 0:
            return
        if half == "train":
            raise ConfigError(
                "data.path" if self.cfg.path else "data.seq_len",
                "the training text is shorter than one window",
                given=f"no window of data.seq_len={self.cfg.seq_len} tokens",
                valid="more text, a smaller data.seq_len, or data.layout=padded",
            )
        raise ConfigError(
            "data.val_path" if self.cfg.val_path else "data.val_fraction",
            "the held-out text is shorter than one window",
            given=self.cfg.val_path or self.cfg.val_fraction,
            valid="a larger share, data.val_path, a smaller data.seq_len, or data.layout=padded",
        )

    def _fixed_held_out(self, rows: Documents) -> datasets.Dataset:
        if isinstance(rows, datasets.IterableDataset):
            rows = datasets.Dataset.from_list(list(islice(rows, self.cfg.shuffle_buffer)))
        self._refuse_empty(rows, "held_out")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return rows.select(order, keep_in_memory=True)

    @property
    def train_tokens(self) -> int | None:
        """Tokens in one pass over packed windows; ``None`` where it is not known beforehand."""
        if isinstance(self._train, datasets.Dataset) and self.cfg.layout is Layout.packed:
            return len(self._train) * self.cfg.seq_len
        return None

    @property
    def held_out_size(self) -> int:
        """Held-out rows there are."""
        self.setup()
        assert self._held_out is not None
        return len(self._held_out)

    def held_out_batches(self, windows: int, batch_size: int) -> Iterator[Batch]:
        """The same `windows` held-out rows at every call, masking included."""
        self.setup()
        assert self._held_out is not None
        rows = self._held_out
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for start in range(0, min(windows, len(rows)), batch_size):
                stop = min(start + batch_size, windows, len(rows))
                yield self._collate([rows[index] for index in range(start, stop)])

    def train_dataloader(self) -> DataLoader[Any]:
        self.setup()
        rank, world = self._rank()
        start = self._resume["batches"] * self.cfg.batch_size
        if isinstance(self._train, datasets.Dataset):
            sampler = ResumableSampler(
                len(self._train), self.seed, rank=rank, world=world,
                epoch=self._resume["epoch"], start=start,
            )  # fmt: skip
            if len(sampler) < self.cfg.batch_size:
                raise ConfigError(
                    "data.batch_size",
                    "is larger than the number of training rows of one process",
                    given=self.cfg.batch_size,
                    valid=f"1 to {len(sampler)}",
                )
            return self._loader(self._train, sampler=sampler, drop_last=True)
        assert self._train is not None
        stream = self._train.shuffle(seed=self.seed, buffer_size=self.cfg.shuffle_buffer)
        if world > 1:
            stream = split_dataset_by_node(stream, rank=rank, world_size=world)
        stream.set_epoch(self._resume["epoch"])
        return self._loader(stream.skip(start) if start else stream, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        self.setup()
        rank, world = self._rank()
        assert self._held_out is not None
        mine = self._held_out.select(range(rank, len(self._held_out) // world * world, world))
        return self._loader(mine)

    def _loader(self, rows: Any, **options: Any) -> DataLoader[Any]:
        # Few workers is a choice here: packing is done, collating is cheap.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return DataLoader(
            rows,
            batch_size=self.cfg.batch_size,
            num_workers=self.cfg.num_workers,
            collate_fn=self._collate,
            **options,
        )

    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"epoch": self.trainer.current_epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = {"epoch": state_dict["epoch"], "batches": state_dict["batches"]}
