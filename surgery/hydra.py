"""For other Hydra apps: `import surgery.hydra` before `hydra.main` gives them our groups.

Hydra 1.4 finds the plugin by its entry point. Hydra 1.3 looks only into the `hydra_plugins`
namespace, where a package has no business of its own, so there the import registers it.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from surgery.config.register import register_recipes


class SurgerySearchPath(SearchPathPlugin):
    """Appends `pkg://surgery.conf`, so that an app's own files of the same name win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        register_recipes()
        if not any(item.path == "pkg://surgery.conf" for item in search_path.get_path()):
            search_path.append(provider="surgery", path="pkg://surgery.conf")


Plugins.instance().register(SurgerySearchPath)
register_recipes()
