"""Register the reader of records with transformers, without importing transformers.

`import surgery` must make `from_pretrained` work, but must not import torch. So the reader is
registered when transformers' own registry is imported, or at once if it is imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from surgery.models.own_record import METHOD

_REGISTRY = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Make transformers read records. A second call does nothing."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "AUTO_QUANTIZER_MAPPING"):
        _register(registry)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(registry: ModuleType) -> None:
    if METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    # transformers takes seconds, and is half imported where this file is.
    from surgery.record.config import RecordConfig
    from surgery.record.reader import RecordReader

    registry.register_quantization_config(METHOD)(RecordConfig)
    registry.register_quantizer(METHOD)(RecordReader)


class _Waiting(MetaPathFinder):
    """Waits for the import of the registry, and removes itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads the registry with its own loader, and then adds the reader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)
