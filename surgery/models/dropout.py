"""Where a model holds the dropout of its attention probabilities, and which config key sets it.

transformers copies the probability into the attention block when it builds the block: as a number
or as an `nn.Dropout`, under one of a few names. The tables below hold these names. Which config
key sets what is read from the architecture's own code.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.config import get_config_part, list_config_prefixes
from surgery.models.reference import ReferenceModels
from surgery.models.sites import Site

# Names that always mean attention probabilities.
_EXPLICIT = re.compile(r"(attention|attn)_(dropout|dropout_p|pdrop)")
# Names that mean attention probabilities if the module has none of the names above.
_PLAIN = ("dropout", "dropout_p", "dropout_prob")
# Blocks that use the same number for something else too, or hold a number that they never use.
_SHARED = {"XLNetRelativeAttention"}
# Backends without dropout. Flex raises; the newer flash attentions silently ignore it.
DROPS_NOTHING = ("flex_attention", "flash_attention_3", "flash_attention_4")
_MARK = 0.34375  # exact in every float type, and nobody's default


class Holder(NamedTuple):
    """One place that holds the probability: an attribute of the module at `path`."""

    path: str
    name: str


def find_holders(block: nn.Module) -> list[Holder]:
    """Find where an attention block holds the dropout of its probabilities, by inner paths.

    Dropout after the output projection does not count.
    """
    holders = []
    for path, module in block.named_modules():
        kind = type(module).__name__
        attends = "attention" in kind.lower() and "output" not in kind.lower()
        if kind in _SHARED or not (attends or module is block) or _never_drops(module):
            continue
        names = [name for name in _list_attribute_names(module) if _EXPLICIT.fullmatch(name)]
        names = names or [name for name in _PLAIN if _holds(module, name)]
        holders += [Holder(path, name) for name in names]
    return holders


def find_dropout_attributes(model: nn.Module, site: Site) -> list[tuple[str, str]]:
    """Find module path and attribute of every number that sets the dropout of a site."""
    block = model.get_submodule(site.path)
    attributes = []
    for holder in find_holders(block):
        path = f"{site.path}.{holder.path}".rstrip(".")
        value = getattr(block.get_submodule(holder.path), holder.name)
        dropout = isinstance(value, _DropoutNd)
        attributes.append((f"{path}.{holder.name}", "p") if dropout else (path, holder.name))
    return attributes


def _list_attribute_names(module: nn.Module) -> list[str]:
    return [name for name in (*module._modules, *vars(module)) if _holds(module, name)]


def _holds(module: nn.Module, name: str) -> bool:
    value = module._modules.get(name, vars(module).get(name))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or isinstance(value, _DropoutNd)


def _never_drops(module: nn.Module) -> bool:
    # Falcon uses the number only if it has no rotary embedding.
    config = getattr(module, "config", None)
    return type(module).__name__ == "FalconAttention" and not getattr(config, "alibi", False)


class HasReferences(Protocol):
    """A model with its reference models, such as a `surgery.plan.draft.Draft`."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def references(self) -> ReferenceModels: ...


def find_governing_keys(described: HasReferences, sites: Sequence[Site]) -> list[str]:
    """Find the config keys that set the attention dropout of all `sites` and of nothing else.

    Returns:
        Dotted keys; an empty list if no set of keys does exactly that.
    """
    keys = []
    model = described.model
    for prefix in sorted({site.config_prefix for site in sites}):
        group = [site for site in sites if site.config_prefix == prefix]
        key = next(
            (k for k in _list_candidates(model, prefix) if _governs(described, k, group)), None
        )
        if key is None:
            return []
        keys.append(key)
    return keys


def reads_config(model: PreTrainedModel, block: nn.Module) -> bool:
    """Whether an attention block reads the probability from its config while it runs."""
    kinds = {kind.__name__ for kind in type(block).__mro__}
    names = {
        key
        for prefix in list_config_prefixes(model.config)
        for key in _list_candidates(model, prefix)
    }
    return any(kinds & _find_running_readers(model, key.rpartition(".")[2]) for key in names)


def _list_candidates(model: PreTrainedModel, prefix: str) -> list[str]:
    config = get_config_part(model.config, prefix)
    return [
        f"{prefix}{name}"
        for name, value in vars(config).items()
        if "drop" in name
        and ("attn" in name or "attention" in name)
        and isinstance(value, (int, float))
    ]


def _governs(described: HasReferences, key: str, sites: Sequence[Site]) -> bool:
    model = described.model
    readers = _find_running_readers(model, key.rpartition(".")[2])
    if any("attention" not in kind.lower() for kind in readers):
        return False
    try:
        reference = described.references.get({key: _MARK})
    except ConfigError:
        return False
    expected = {
        (f"{site.path}.{holder.path}".rstrip("."), holder.name)
        for site in sites
        for holder in find_holders(model.get_submodule(site.path))
    }
    return bool(expected) and _find_marked(dict(reference.named_modules())) == expected


def _find_marked(modules: Mapping[str, nn.Module]) -> set[tuple[str, str]]:
    """Find where a reference model holds the mark, as module path and attribute."""
    marked = set()
    for path, module in modules.items():
        if isinstance(module, _DropoutNd):
            if module.p == _MARK:
                parent, _, name = path.rpartition(".")
                marked.add((parent, name))
        else:
            marked |= {(path, name) for name, value in vars(module).items() if value == _MARK}
    return marked


def _find_running_readers(model: PreTrainedModel, key: str) -> set[str]:
    """Find the classes in the model's source that read ``config.<key>`` outside `__init__`."""
    files = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return {
        kind.name
        for file in files
        for kind in _parse_classes(file)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__"
        if any(_is_read(node, key) for node in ast.walk(method))
    }


@cache
def _parse_classes(module: str) -> tuple[ast.ClassDef, ...]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, KeyError, TypeError):  # there is no source file, as in a notebook
        return ()
    return tuple(node for node in tree.body if isinstance(node, ast.ClassDef))


def _is_read(node: ast.AST, key: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == key
        and ast.unparse(node.value).endswith("config")
    )
