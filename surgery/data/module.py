"""The Lightning data module: training batches that resume, and a fixed held-out set."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any, NoReturn

import datasets
import pytorch_lightning as pl
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, LossOn, Task
from surgery.data.collate import Batch, make_collator
from surgery.data.sampler import ResumableSampler
from surgery.data.sources import Documents, load_corpus, reading
from surgery.data.stream import StreamBatches
from surgery.data.windows import make_windows
from surgery.errors import ConfigError


class TextData(pl.LightningDataModule):
    """Batches for one model from one corpus.

    Args:
        cfg: `data.*`.
        tokenizer: the model's.
        task: decides labels, special tokens and masking.
        seed: decides the order of training windows.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.task = task
        self.seed = seed
        self._collate = make_collator(tokenizer, cfg, task)
        self._train: Documents | None = None
        self._held_out: datasets.Dataset | None = None
        self._stream: StreamBatches | None = None
        self._resumed: dict[str, int] = {}
        # Held-out rows of a validation: the last ones, since the first are measured. None: all.
        self.validation_windows: int | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenize the data. Only the first call does the work.

        Raises:
            ConfigError: data is missing, empty, or shorter than one window.
        """
        if stage == "fit":  # a new fit; a resumed one calls `load_state_dict` after this
            self._stream, self._resumed = None, {}
        if self._train is not None:
            return
        if self.cfg.layout is Layout.packed and self.task is not Task.causal_lm:
            raise ConfigError(
                "data.layout",
                "packed windows need causal_lm: other tasks attend in both directions",
                given="packed",
                valid="padded",
            )
        corpus = load_corpus(self.cfg, self.task, self.tokenizer)
        train, held_out = (
            make_windows(half, self.tokenizer, self.cfg, self.task, whole=corpus.whole)
            for half in (corpus.train, corpus.held_out)
        )
        if _count_rows(train, enough=1) == 0:
            self._refuse_empty("train")
        self._held_out = self._select_held_out(held_out)
        self._train = train

    def check_training(self) -> None:
        """Check that there is enough data to train on.

        Raises:
            ConfigError: a process has too few rows for one batch.
        """
        self.setup()
        assert self._train is not None
        _, world = self._get_rank()
        rows = _count_rows(self._train, enough=self.cfg.batch_size * world) // world
        if rows < self.cfg.batch_size:
            raise ConfigError(
                "data.batch_size",
                "must not be larger than the number of training rows of one process",
                given=self.cfg.batch_size,
                valid=f"1 to {rows}",
            )

    def _refuse_empty(self, half: str) -> NoReturn:
        if self.cfg.loss_on is LossOn.assistant:
            raise ConfigError(
                "data.loss_on",
                f"no window of the {'training' if half == 'train' else 'held-out'} text has a "
                "token of an answer to predict",
                given=self.cfg.loss_on.value,
                valid="all, more text, another data.seq_len, or data.layout=padded",
            )
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

    def _select_held_out(self, rows: Documents) -> datasets.Dataset:
        if isinstance(rows, datasets.IterableDataset):
            with reading("data.path"):
                rows = datasets.Dataset.from_list(list(islice(rows, self.cfg.shuffle_buffer)))
        if len(rows) == 0:
            self._refuse_empty("held_out")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return rows.select(order, keep_in_memory=True)

    @property
    def held_out_size(self) -> int:
        """Number of held-out rows."""
        self.setup()
        assert self._held_out is not None
        return len(self._held_out)

    def load_held_out_batches(self, windows: int, batch_size: int) -> Iterator[Batch]:
        """Yield `windows` held-out rows in batches: the same rows and masks at every call."""
        return self._load_held_out(range(min(windows, self.held_out_size)), batch_size)

    def load_validation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the held-out rows of a validation in batches: the same at every call."""
        return self._load_held_out(self._select_validation_rows(), batch_size)

    def _load_held_out(self, places: range, batch_size: int) -> Iterator[Batch]:
        assert self._held_out is not None
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            yield self._collate([self._held_out[index] for index in part])

    def draw_calibration_batches(self, windows: int, batch_size: int) -> list[Batch]:
        """Draw `windows` training rows by the seed (a stream: its first rows), without labels."""
        batches = self.draw_importance_batches(windows, batch_size)
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]

    def draw_importance_batches(self, windows: int, batch_size: int) -> list[Batch]:
        """Draw the same training rows with their labels."""
        self.setup()
        if isinstance(self._train, datasets.Dataset):
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(self._train), generator=generator)[:windows].tolist()
            rows = [self._train[index] for index in order]
        else:
            assert self._train is not None
            with reading("data.path"):
                rows = list(islice(self._train, windows))
        return [self._collate(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]

    def train_dataloader(self) -> DataLoader[Any] | StreamBatches:
        self.check_training()
        rank, world = self._get_rank()
        if isinstance(self._train, datasets.Dataset):
            sampler = ResumableSampler(
                len(self._train),
                self.cfg.batch_size,
                self.seed,
                rank=rank,
                world=world,
                trained=self._count_trained,
            )
            return self._make_loader(self._train, batch_sampler=sampler)
        if self._stream is None:
            assert self._train is not None
            rows = self._train.shuffle(seed=self.seed, buffer_size=self.cfg.shuffle_buffer)
            if world > 1:
                rows = split_dataset_by_node(rows, rank=rank, world_size=world)
            self._stream = StreamBatches(
                rows,
                self._make_loader(rows, batch_size=self.cfg.batch_size, drop_last=True),
                trained=self._count_trained,
                epoch=self._resumed.get("epoch", 0),
                began=self._resumed.get("began", 0),
            )
        return self._stream

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = self._get_rank()
        mine = self._select_validation_rows()
        assert self._held_out is not None
        # Every process takes as many rows; if there are too few to share, each takes all.
        if len(mine) >= world:
            mine = mine[rank : len(mine) // world * world : world]
        # With a generator of its own it leaves torch's alone, so training goes on as without it.
        return self._make_loader(
            self._held_out.select(mine),
            batch_size=self.cfg.batch_size,
            generator=torch.Generator().manual_seed(0),
        )

    def count_validation_rows(self) -> int:
        """Count the held-out rows that a validation looks at."""
        size = self.held_out_size
        return size if self.validation_windows is None else min(size, self.validation_windows)

    def count_shared_rows(self, measured: int) -> int:
        """Count the rows of a validation among the first `measured` ones: short text is shared."""
        first = self._select_validation_rows().start
        return max(0, min(measured, self.held_out_size) - first)

    def _select_validation_rows(self) -> range:
        return range(self.held_out_size - self.count_validation_rows(), self.held_out_size)

    def hash_validation_rows(self) -> str:
        """Hash what a validation feeds the model, row by row: tokens, positions and labels."""
        digest = hashlib.sha256()
        for batch in self.load_validation_batches(1):
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _make_loader(self, rows: Any, **options: Any) -> DataLoader[Any]:
        # Few workers are enough: packing is done already, and collating is cheap.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return DataLoader(
            rows, num_workers=self.cfg.num_workers, collate_fn=self._collate, **options
        )

    def _get_rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _count_trained(self) -> int:
        """Count the batches that this run has trained on, before a resume and after it."""
        trainer: Any = self.trainer
        if trainer is None or trainer.overfit_batches:  # overfitting uses the same batches again
            return 0
        done: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        # Lightning may ask for a batch before it restores its own counters.
        return max(done, self._resumed.get("batches", 0))

    def state_dict(self) -> dict[str, int]:
        trained = self._count_trained()
        if self._stream is None:
            return {"batches": trained}
        epoch, began = self._stream.find_epoch(trained)
        return {"batches": trained, "epoch": epoch, "began": began}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resumed = dict(state_dict)


def _count_rows(rows: Documents, enough: int) -> int:
    """Count the rows; of a stream, at most `enough`."""
    if isinstance(rows, datasets.Dataset):
        return len(rows)
    with reading("data.path"):
        return sum(1 for _ in islice(rows, enough))
