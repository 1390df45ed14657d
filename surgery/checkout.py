"""A checkout runs its own conf, recipes and callbacks, whichever checkout is installed.

Installed, they are parts of this package. In a checkout they lie beside it, and an editable install
of another checkout would be used for them: code of one, YAML of the other, without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("callbacks", "conf", "recipes")


def use_own_folders() -> None:
    """Find `surgery.conf` and the like beside this very package, where they lie there."""
    if (_ROOT / "pyproject.toml").is_file() and not any(
        isinstance(finder, _OwnFolderFinder) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _OwnFolderFinder())


class _OwnFolderFinder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, folder = name.partition(".")
        if package != "surgery" or folder not in _FOLDERS:
            return None
        file = _ROOT / folder / "__init__.py"
        if not file.is_file():
            return None
        return spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
