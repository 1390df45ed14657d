"""`model.*` as the config files have it, and directories to point it at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.config.schema import Dtype, ModelConfig, Task
from surgery.models.source import ModelSource

Edit = Callable[[Path], None]


def source(path: Path | str | None = None, **fields: Any) -> ModelSource:
    defaults: dict[str, Any] = {
        "path": None if path is None else str(path),
        "revision": None,
        "tokenizer": None,
        "task": Task.causal_lm,
        "dtype": Dtype.float32,
        "device": "cpu",
        "attn_implementation": "sdpa",
        "num_labels": None,
        "trust_remote_code": False,
        "scratch": None,
    }
    return ModelSource(ModelConfig(**(defaults | fields)))


def edited(original: Path, copy: Path, edit: Edit) -> Path:
    """A copy of a model directory that `edit` has changed."""
    shutil.copytree(original, copy)
    edit(copy)
    return copy


def with_config(**fields: Any) -> Edit:
    """Config fields set, or removed where they are `...`."""

    def edit(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit
