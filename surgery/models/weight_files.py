"""Check the weight files of a model directory before a loader sees them.

transformers loads what an index names. So all that it would open is checked here: safetensors files
inside the directory, with valid headers; or, where there are none, pickled ones, of tensors alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from surgery.config.hints import shorten
from surgery.errors import ConfigError, join_lines
from surgery.files import read_json
from surgery.models.pickled import read_pickled_shapes

WEIGHTS, INDEX = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
PICKLED, PICKLED_INDEX = WEIGHTS_NAME, WEIGHTS_INDEX_NAME
SUFFIX, PICKLED_SUFFIX = ".safetensors", ".bin"
# As transformers looks for them.
_NAMES = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
_VALID = f"a directory with *{SUFFIX} or {PICKLED}"


def check_weight_files(folder: Path, given: Any, named: Any = None) -> None:
    """Check the files that transformers would load from `folder`.

    Args:
        given, named: as for `list_weight_files`.

    Raises:
        ConfigError: there are no weights; or a file is not one of safetensors inside the directory,
            or of pickled tensors and nothing else; or the model is an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            "model.path",
            "the directory holds an adapter (adapter_config.json), whose base would be loaded",
            given=given,
            valid="a model whose adapter is merged into its weights, without that file",
        )
    for file in list_weight_files(folder, given, named):
        check_weight_file(file, given)


def is_pickled(folder: Path, named: Any = None) -> bool:
    """Whether transformers would load pickled files from `folder`, for want of others."""
    if named is not None:
        return False
    found = next((name for name in _NAMES if (folder / name).is_file()), WEIGHTS)
    return found in (PICKLED, PICKLED_INDEX)


def list_weight_files(folder: Path, given: Any, named: Any = None) -> list[Path]:
    """List the files that transformers would load from `folder`; they need not be there.

    Args:
        given: the value of `model.path`, for messages.
        named: the config's `transformers_weights`, which takes the place of the usual names.

    Raises:
        ConfigError: there are no weights; or what names the files is no index, or names something
            else than files of its own kind inside the directory.
    """
    if named is not None:
        name = _check_name(named, "config.json names", given, SUFFIX, f"{SUFFIX}.index.json")
    else:
        found = next((name for name in _NAMES if (folder / name).is_file()), None)
        if found is None:
            raise _explain_missing(folder, given)
        name = found
    if not name.endswith(".json"):
        return [folder / name]
    return [folder / shard for shard in read_shards(folder / name, given)]


def read_shards(index: Path, given: Any) -> list[str]:
    """Read the names of the shards from an index; each is a plain name of a file of its kind.

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
    suffix = PICKLED_SUFFIX if index.name == PICKLED_INDEX else SUFFIX
    where = f"{index.name} names"
    return sorted({_check_name(name, where, given, suffix) for name in names.values()})


def _check_name(name: Any, where: str, given: Any, *endings: str) -> str:
    plain = isinstance(name, str) and "/" not in name and "\\" not in name and "\0" not in name
    if not plain or not name.endswith(endings):
        kind = endings[0].removeprefix(".")
        raise _make_error(
            f"{where} {shorten(name)}, which is not a {kind} file of the directory", given
        )
    return str(name)


def check_weight_file(path: Path, given: Any) -> None:
    """Check that a file is there and holds tensors, by its header; of a pickled one, by reading it.

    Raises:
        ConfigError: it does not.
    """
    # Unlike pathlib, it answers "no" for any text.
    if not os.path.isfile(path):
        raise _make_error(f"there is no {shorten(path.name)}", given)
    try:
        tensors = len(read_shapes(path))
    except (SafetensorError, OSError, ValueError) as error:
        pickled = path.name.endswith(PICKLED_SUFFIX)
        what = "does not hold tensors alone" if pickled else "is not a safetensors file"
        raise _make_error(
            f"cannot be loaded: {path.name} {what}: {join_lines(error)}", given
        ) from None
    if not tensors:
        raise _make_error(f"{path.name} holds no tensors", given)


def read_shapes(path: Path, names: Iterable[str] | None = None) -> dict[str, list[int]]:
    """Read name → shape from a file of weights; of all tensors, or of some that it may hold.

    Raises:
        SafetensorError, OSError, ValueError: it cannot be read.
    """
    if path.name.endswith(PICKLED_SUFFIX):
        shapes = read_pickled_shapes(path)
        return {
            name: shapes[name] for name in (shapes if names is None else names) if name in shapes
        }
    with safe_open(path, framework="pt") as file:
        kept = set(file.keys()) if names is None else set(file.keys()).intersection(names)
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(kept)}


def _explain_missing(folder: Path, given: Any) -> ConfigError:
    others = [path for suffix in (SUFFIX, ".gguf") for path in sorted(folder.glob(f"*{suffix}"))]
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if others and others[0].name.endswith(".gguf"):
        return _make_error(f"has {others[0].name}: name the file itself", given)
    if others or pickled:
        other = (others or pickled)[0].name
        return _make_error(f"has {other}, but no {', '.join(_NAMES)}", given)
    return _make_error("the directory has no weights", given)


def _make_error(problem: str, given: Any) -> ConfigError:
    return ConfigError("model.path", problem, given=given, valid=_VALID)
