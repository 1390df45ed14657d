"""For other Hydra apps: `import surgery.hydra` before `hydra.main` gives them our groups.

Hydra 1.4 finds the plugin by its entry point. Hydra 1.3 looks only into the `hydra_plugins`
namespace, which is not ours, so there the import registers it.

An operation that another package brings, by the entry point group `surgery.operations`, is a choice
of `attention` too, by its options' defaults, unless a YAML of its name is on the search path.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from surgery.config.register import register_operation, register_recipes


class SurgerySearchPath(SearchPathPlugin):
    """Appends `pkg://surgery.conf`, so that an app's own files of the same name win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        register_recipes()
        if not any(item.path == "pkg://surgery.conf" for item in search_path.get_path()):
            search_path.append(provider="surgery", path="pkg://surgery.conf")
        if entry_points(group="surgery.operations"):
            _register_operations(search_path)


def _register_operations(search_path: ConfigSearchPath) -> None:
    from surgery.plan.registry import find_operations  # seconds, for torch and transformers

    paths = [item.path for item in search_path.get_path()]
    for name, kind in find_operations().items():
        # Hydra would merge a stored config of the same name into a file's, and warn of it.
        if not any(_has_file(path, f"{name}.yaml") for path in paths):
            register_operation(name, kind)


def _has_file(path: str, name: str) -> bool:
    """Whether an element of Hydra's search path holds a file in its group `attention`."""
    scheme, found, rest = path.partition("://")
    if not found or scheme == "file":
        return Path(rest if found else path, "attention", name).is_file()
    if scheme != "pkg":
        return False
    try:
        return files(rest.replace("/", ".")).joinpath("attention", name).is_file()
    except ModuleNotFoundError:
        return False


Plugins.instance().register(SurgerySearchPath)
register_recipes()
