"""Where the dropout of attention probabilities is held, and which config key says it.

transformers copies the probability to the attention block when it builds it, as a number or as an
`nn.Dropout`, under a handful of names. All that is known by name stands in the tables below; what
a config key governs is asked of the architecture's own code.
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
from surgery.models.config import config_at, config_prefixes
from surgery.models.reference import ReferenceModels
from surgery.models.sites import Site

# Names that say attention probabilities whatever else the block drops.
_EXPLICIT = re.compile(r"(attention|attn)_(dropout|dropout_p|pdrop)")
# Names that mean them where none of the above stands beside.
_PLAIN = ("dropout", "dropout_p", "dropout_prob")
# Blocks that drop something else with the same number, or hold a number they never use.
_SHARED = {"XLNetRelativeAttention"}
# Backends without dropout: flex raises, the newer flash attentions leave it out silently.
DROPS_NOTHING = ("flex_attention", "flash_attention_3", "flash_attention_4")
_MARK = 0.34375  # exact in every float type; no one's default


class Holder(NamedTuple):
    """One place that holds the probability: an attribute of a module, below `path`."""

    path: str
    name: str


def holders(block: nn.Module) -> list[Holder]:
    """Where the attention block holds the dropout of its probabilities, by paths within it.

    Dropout after the output projection is none of them.
    """
    found = []
    for path, module in block.named_modules():
        kind = type(module).__name__
        attends = "attention" in kind.lower() and "output" not in kind.lower()
        if kind in _SHARED or not (attends or module is block) or _never_drops(module):
            continue
        names = [name for name in _attribute_names(module) if _EXPLICIT.fullmatch(name)]
        names = names or [name for name in _PLAIN if _holds(module, name)]
        found += [Holder(path, name) for name in names]
    return found


def dropout_attributes(model: nn.Module, site: Site) -> list[tuple[str, str]]:
    """Module path and attribute of every number that says the dropout of a site's attention."""
    block = model.get_submodule(site.path)
    found = []
    for holder in holders(block):
        path = f"{site.path}.{holder.path}".rstrip(".")
        value = getattr(block.get_submodule(holder.path), holder.name)
        dropout = isinstance(value, _DropoutNd)
        found.append((f"{path}.{holder.name}", "p") if dropout else (path, holder.name))
    return found


def get_dropout(block: nn.Module, holder: Holder) -> float:
    """The probability that a holder says."""
    value = getattr(block.get_submodule(holder.path), holder.name)
    return float(value.p if isinstance(value, _DropoutNd) else value)


def _attribute_names(module: nn.Module) -> list[str]:
    return [name for name in (*module._modules, *vars(module)) if _holds(module, name)]


def _holds(module: nn.Module, name: str) -> bool:
    value = module._modules.get(name, vars(module).get(name))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or isinstance(value, _DropoutNd)


def _never_drops(module: nn.Module) -> bool:
    # Falcon passes the number on only where it has no rotary embedding.
    config = getattr(module, "config", None)
    return type(module).__name__ == "FalconAttention" and not getattr(config, "alibi", False)


class Described(Protocol):
    """A model, and the reference models that can be asked about its config."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def references(self) -> ReferenceModels: ...


def find_governing_keys(described: Described, sites: Sequence[Site]) -> list[str]:
    """The config keys that say the attention dropout of all `sites` and of nothing else.

    Args:
        described: a `surgery.plan.operation.Draft`, say.

    Returns:
        Dotted keys; none at all where no set of keys says exactly that.
    """
    keys = []
    model = described.model
    for prefix in sorted({site.config_prefix for site in sites}):
        group = [site for site in sites if site.config_prefix == prefix]
        key = next((k for k in _candidates(model, prefix) if _governs(described, k, group)), None)
        if key is None:
            return []
        keys.append(key)
    return keys


def reads_config(model: PreTrainedModel, block: nn.Module) -> bool:
    """Whether an attention block takes the probability from its config while it runs."""
    kinds = {kind.__name__ for kind in type(block).__mro__}
    names = {key for prefix in config_prefixes(model.config) for key in _candidates(model, prefix)}
    return any(kinds & _running_readers(model, key.rpartition(".")[2]) for key in names)


def _candidates(model: PreTrainedModel, prefix: str) -> list[str]:
    config = config_at(model.config, prefix)
    return [
        f"{prefix}{name}"
        for name, value in vars(config).items()
        if "drop" in name
        and ("attn" in name or "attention" in name)
        and isinstance(value, (int, float))
    ]


def _governs(described: Described, key: str, sites: Sequence[Site]) -> bool:
    model = described.model
    readers = _running_readers(model, key.rpartition(".")[2])
    if any("attention" not in kind.lower() for kind in readers):
        return False
    try:
        reference = described.references.of({key: _MARK})
    except ConfigError:
        return False
    expected = {
        (f"{site.path}.{holder.path}".rstrip("."), holder.name)
        for site in sites
        for holder in holders(model.get_submodule(site.path))
    }
    return bool(expected) and _marked(dict(reference.named_modules())) == expected


def _marked(modules: Mapping[str, nn.Module]) -> set[tuple[str, str]]:
    """Where a reference model holds the mark, as module path and attribute."""
    found = set()
    for path, module in modules.items():
        if isinstance(module, _DropoutNd):
            if module.p == _MARK:
                parent, _, name = path.rpartition(".")
                found.add((parent, name))
        else:
            found |= {(path, name) for name, value in vars(module).items() if value == _MARK}
    return found


def _running_readers(model: PreTrainedModel, key: str) -> set[str]:
    """Classes of the model's source that read ``config.<key>`` outside their `__init__`."""
    files = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return {
        kind.name
        for file in files
        for kind in _classes(file)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__"
        if any(_is_read(node, key) for node in ast.walk(method))
    }


@cache
def _classes(module: str) -> tuple[ast.ClassDef, ...]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, KeyError, TypeError):  # written nowhere, as in a notebook
        return ()
    return tuple(node for node in tree.body if isinstance(node, ast.ClassDef))


def _is_read(node: ast.AST, key: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == key
        and ast.unparse(node.value).endswith("config")
    )
