"""The model that all rows are about, and where their runs lie."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import surgery.hydra  # noqa: F401  (Hydra finds the groups)
from surgery.config.validate import check_config
from surgery.models.length import read_length
from surgery.models.sites import get_text_config
from surgery.models.source import EMBEDDED, ModelSource, find_embedded_dir

DEFAULT = "smollm2"
FOLDER = "DIR"  # on pages, in place of somebody's own directory


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        name: of the results file.
        override: that a run on the untouched model is given.
        shown: the same on pages.
        path: `model.path` of it, and `objective.teacher`.
        shown_path: the same on pages.
        weights: identity; rows of other weights are no use together.
        kv_heads: of a layer.
        width: of the hidden states.
        head_dim: width of a head.
        positions: that it was trained for; 0 if its config does not say.
    """

    name: str
    override: str
    shown: str
    path: str
    shown_path: str
    weights: str
    kv_heads: int
    width: int
    head_dim: int
    positions: int


def find_subject(model: str | None, name: str | None) -> Subject:
    """Read the config of a model, which is fetched if `model=smollm2` has to.

    Args:
        model: for `model.path`; ``None``: the group `model=smollm2`.
        name: of the results; ``None``: by the model.

    Raises:
        SurgeryError: there is no such model.
    """
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())  # commands run in the project's folder
    override = f"model={DEFAULT}" if model is None else f"model.path={model}"
    # Runs that were started in this process may have left Hydra as they needed it.
    GlobalHydra.instance().clear()
    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=[override, "run_dir=unused", "logger=none"])
    OmegaConf.resolve(cfg)
    run = check_config(cfg)
    source = ModelSource(run.model)
    config = get_text_config(source.load_config())
    path = str(run.model.path)
    local = path != EMBEDDED and Path(path).exists()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Subject(
        name=choose_name(model, name),
        override=override,
        shown=override if not local or model is None else f"model.path={FOLDER}",
        path=str(Path(path).absolute()) if local else path,
        shown_path=FOLDER if local else path,
        weights=_identify(path),
        kv_heads=int(heads),
        width=int(config.hidden_size),
        head_dim=int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        positions=read_length(config) or 0,
    )


def choose_name(model: str | None, name: str | None) -> str:
    """Choose the name of the results: the one given, or that of the model's folder."""
    if name is None:
        name = DEFAULT if model is None else Path(model).name
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "model"


def _identify(path: str) -> str:
    """Hash the weights; a path that does not exist here stands for itself."""
    where = find_embedded_dir() if path == EMBEDDED else Path(path)
    if not where.exists():
        return path
    files = [where]
    if where.is_dir():
        files = sorted((*where.glob("*.safetensors"), *where.glob("*.bin")))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:12]
