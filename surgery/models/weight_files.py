"""Check the weight files of a model directory before a loader sees them.

transformers loads what an index names, and unpickles what is not called .safetensors. So all that
it would open is checked here: safetensors files inside the directory, with valid headers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from surgery.config.hints import shorten
from surgery.errors import ConfigError, join_lines
from surgery.files import read_json

WEIGHTS = SAFE_WEIGHTS_NAME
INDEX = SAFE_WEIGHTS_INDEX_NAME
_SUFFIX = ".safetensors"
_VALID = "a directory with *.safetensors"


def check_weight_files(folder: Path, given: Any, named: Any = None) -> None:
    """Check the files that transformers would load from `folder`.

    Args:
        given, named: as for `list_weight_files`.

    Raises:
        ConfigError: there are no weights, or only pickled ones; or a file is not a safetensors
            file inside the directory; or the model is an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            "model.path",
            "the directory holds an adapter (adapter_config.json), whose base would be loaded",
            given=given,
            valid="a model whose adapter is merged into its weights, without that file",
        )
    for file in list_weight_files(folder, given, named):
        _check_header(file, given)


def list_weight_files(folder: Path, given: Any, named: Any = None) -> list[Path]:
    """List the files that transformers would load from `folder`; they need not be there.

    Args:
        given: the value of `model.path`, for messages.
        named: the config's `transformers_weights`, which takes the place of the usual names.

    Raises:
        ConfigError: there are no weights, or only pickled ones; or what names the files is no
            index, or names something else than safetensors files inside the directory.
    """
    if named is not None:
        name = _check_name(named, "config.json names", given)
    elif (folder / WEIGHTS).is_file():
        name = WEIGHTS
    elif (folder / INDEX).is_file():
        name = INDEX
    else:
        raise _explain_missing(folder, given)
    if not name.endswith(".json"):
        return [folder / name]
    return [folder / shard for shard in read_shards(folder / name, given)]


def read_shards(index: Path, given: Any) -> list[str]:
    """Read the names of the shards from an index; each is a plain name of a safetensors file.

    Raises:
        ConfigError: the index is no index, or names something else.
    """
    try:
        data = read_json(index)
    except (OSError, ValueError) as error:
        raise _make_error(f"{index.name} cannot be read: {join_lines(error)}", given) from None
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, Mapping) or not names:
        raise _make_error(f"{index.name} has no weight_map of tensors to files", given)
    return sorted({_check_name(name, f"{index.name} names", given) for name in names.values()})


def _check_name(name: Any, where: str, given: Any) -> str:
    endings = (_SUFFIX, f"{_SUFFIX}.index.json")
    plain = isinstance(name, str) and "/" not in name and "\\" not in name and "\0" not in name
    if not plain or not name.endswith(endings):
        raise _make_error(
            f"{where} {shorten(name)}, which is not a safetensors file of the directory", given
        )
    return str(name)


def _check_header(path: Path, given: Any) -> None:
    # Unlike pathlib, it answers "no" for any text.
    if not os.path.isfile(path):
        raise _make_error(f"there is no {shorten(path.name)}", given)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = len(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise _make_error(
            f"cannot be loaded: {path.name} is not a safetensors file: {join_lines(error)}", given
        ) from None
    if not tensors:
        raise _make_error(f"{path.name} holds no tensors", given)


def _explain_missing(folder: Path, given: Any) -> ConfigError:
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickled:
        return _make_error(
            f"has only pickled weights ({pickled[0].name}), which are never loaded", given
        )
    others = sorted(folder.glob(f"*{_SUFFIX}"))
    if others:
        return _make_error(f"has {others[0].name}, but no {WEIGHTS} and no {INDEX}", given)
    return _make_error("the directory has no weights", given)


def _make_error(problem: str, given: Any) -> ConfigError:
    return ConfigError("model.path", problem, given=given, valid=_VALID)
