"""The models of a grid on disk: the shipped one, packaged ones, and those trained here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from benchmarks.shared.settings import Windows
from surgery.console import say
from surgery.models.source import EMBEDDED, find_embedded_dir

ROOT = Path(__file__).parents[2]
_ENOUGH = 2000  # characters of a failed training's output


@dataclass(frozen=True)
class Kind:
    """A model of the grid.

    Attributes:
        steps: it was trained for, each of the preset's batch_size x seq_len tokens; 0: somebody
            else trained it.
        overrides: of `+recipe=pretrain_tiny`; none for a model that ships with a package.
        package: an installed package that holds the model in its folder `model`.
    """

    name: str
    what: str
    steps: int
    overrides: tuple[str, ...] = ()
    package: str = ""

    @property
    def shipped(self) -> bool:
        return self.name == EMBEDDED


def folder(kind: Kind, seed: int, models: Path) -> Path:
    """Where its weights are, or will be; those that ship are the same for every seed."""
    if kind.package:
        installed = find_spec(kind.package) is not None
        return Path(str(files(kind.package) / "model")) if installed else models / "not installed"
    return find_embedded_dir() if kind.shipped else models / f"{kind.name}-{seed}" / "export"


def path_of(kind: Kind, seed: int, models: Path) -> str:
    """For `model.path`."""
    return EMBEDDED if kind.shipped else str(folder(kind, seed, models))


def there(kind: Kind, seed: int, models: Path) -> bool:
    return (folder(kind, seed, models) / "config.json").is_file()


def identity(kind: Kind, seed: int, models: Path) -> str:
    """Of the weights: cells of other weights are no use together."""
    digest = hashlib.sha256()
    for path in sorted(folder(kind, seed, models).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def training_command(
    kind: Kind, seed: int, preset: Windows, models: Path, threads: int
) -> list[str]:
    """The project's own recipe, from random weights; nothing but the export is wanted."""
    return [
        sys.executable,
        "train.py",
        "+recipe=pretrain_tiny",
        f"seed={seed}",
        f"threads={threads}",
        "stages=[train,export]",
        "trainer.limit_val_batches=0",
        "logger=none",
        "export.dtype=auto",
        "callbacks.head_importance=null",
        "callbacks.attention_statistics=null",
        "callbacks.head_alarms=null",
        f"data.seq_len={preset.seq_len}",
        f"data.batch_size={preset.batch_size}",
        f"trainer.max_steps={kind.steps}",
        f"hydra.run.dir={folder(kind, seed, models.resolve()).parent}",
        *kind.overrides,
    ]


def train(kind: Kind, seed: int, preset: Windows, models: Path, threads: int) -> None:
    """Raises: RuntimeError, with the end of what the training said; nothing here trains `kind`."""
    if kind.package:
        raise RuntimeError(f"{kind.name}: the package {kind.package} is not installed")
    say(f"{kind.name}-{seed}: training for {kind.steps} steps")
    done = subprocess.run(
        training_command(kind, seed, preset, models, threads),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not there(kind, seed, models):
        raise RuntimeError(f"{kind.name}-{seed} was not trained:\n{done.stdout[-_ENOUGH:]}")
