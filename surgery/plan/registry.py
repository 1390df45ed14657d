"""Find the operations; no list of them is kept.

Every module of `surgery.operations` that defines an `Operation` adds one; other packages add theirs
with the entry point group `surgery.operations`. They are imported on the first call. A class that
is defined later, in a notebook say, is found from then on.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from transformers import PreTrainedModel

from surgery.config.hints import find_misfit, shorten
from surgery.config.options import check_ranges, get_valid
from surgery.errors import ConfigError, PlanError
from surgery.models.share_kv import use_shared_kv
from surgery.plan.operation import SHARE_KV, Operation, StepFunction
from surgery.transforms import register_transform

GROUP = "surgery.operations"


def find_operations() -> dict[str, type[Operation]]:
    """Find all operations: name → class, sorted by name.

    Raises:
        PlanError: two have the same name, or one of another package cannot be imported.
    """
    _import_operations()
    found: dict[str, type[Operation]] = {}
    for kind in _walk_subclasses(Operation):  # type: ignore[type-abstract]
        if not hasattr(kind, "name"):
            continue
        other = found.get(kind.name, kind)
        # The same name in the same place is the same class, written once more.
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise PlanError(
                f"two operations are named {kind.name}: {other.__module__} and {kind.__module__}"
            )
        found[kind.name] = kind
        for name, (transform, equivalent) in kind.transforms.items():
            register_transform(name, transform, equivalent)
    return dict(sorted(found.items()))


@cache
def _import_operations() -> None:
    for module in pkgutil.iter_modules(import_module(GROUP).__path__, f"{GROUP}."):
        import_module(module.name)
    for entry in entry_points(group=GROUP):
        _load_entry(entry)


def _load_entry(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        where = f"{entry.value} of {entry.dist.name}" if entry.dist else entry.value
        raise PlanError(
            f"the operation {entry.name} ({where}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _walk_subclasses(kind: type[Operation]) -> Iterator[type[Operation]]:
    for one in kind.__subclasses__():
        yield one
        yield from _walk_subclasses(one)


def get_operation(name: str) -> type[Operation]:
    """Get the class of an operation.

    Raises:
        PlanError: no operation of this name is installed.
    """
    if name not in find_operations():
        raise PlanError(
            f"the plan needs the operation {name!r}, which is not installed here; installed are "
            f"{', '.join(find_operations())}"
        )
    return find_operations()[name]


def list_operations() -> list[str]:
    return list(find_operations())


def list_options(name: str) -> list[str]:
    """List the options of an operation; empty if there is no such operation."""
    kind = find_operations().get(name)
    return [] if kind is None else [field.name for field in fields(kind)]


def _find_steps() -> dict[str, StepFunction]:
    found: dict[str, StepFunction] = {SHARE_KV: _share_kv}
    for operation in find_operations().values():
        for kind, function in operation.steps.items():
            if kind in found and found[kind] is not function:
                raise PlanError(f"two operations have a step {kind!r}")
            found[kind] = function
    return found


def _share_kv(model: PreTrainedModel) -> None:
    use_shared_kv(model)


def is_step(kind: str) -> bool:
    return kind in _find_steps()


def is_recordable(kind: str) -> bool:
    """Whether a record may hold a step of this kind: it changes what a model computes."""
    owners = [one for one in find_operations().values() if kind in one.steps]
    return is_step(kind) and not any(one.runs_only or one.transient for one in owners)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments from a file against the parameters of a function, but for the first.

    Raises:
        PlanError: one is unknown, missing, or of the wrong type.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    known = {one.name: one for one in parameters if one.kind is not one.VAR_KEYWORD}
    for name, value in arguments.items():
        if name in known:
            misfit = find_misfit(value, hints[name], name)
            if misfit is not None:
                raise PlanError(misfit)
        elif len(known) == len(parameters):
            raise PlanError(f"there is no argument {name!r}")
    for one in known.values():
        if one.default is one.empty and one.name not in arguments:
            raise PlanError(f"{one.name}: is missing")


def check_step(kind: Any, arguments: Mapping[str, Any]) -> None:
    """Check a step of a plan or a record, which may be somebody else's.

    Raises:
        PlanError: there is no such step here, or it does not take these arguments.
    """
    if not isinstance(kind, str) or not is_step(kind):
        raise PlanError(f"it needs the step {shorten(kind)}, which does not exist here")
    try:
        check_arguments(_find_steps()[kind], arguments)
    except PlanError as error:
        raise PlanError(f"step {kind}: {error}") from None


def run_step(kind: str, model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Run the step of this kind.

    Raises:
        KeyError: there is no such step.
    """
    _find_steps()[kind](model, **arguments)


def restore_saved_form_(model: PreTrainedModel) -> None:
    """Undo in place what operations did only for the run, before the model is saved."""
    for operation in find_operations().values():
        operation.undo_(model)


def parse_operations(attention: Mapping[str, Any]) -> list[Operation]:
    """Parse `attention.*` into operations, in the same order.

    Raises:
        ConfigError: an unknown operation, an unknown option, a value of the wrong type or out of
            its range, or options that contradict each other.
    """
    return [_parse(name, options) for name, options in attention.items()]


def parse_specs(specs: Any) -> list[Operation]:
    """Parse the operations in a plan's JSON."""
    named = [(str(spec["operation"]), dict(spec)) for spec in specs]
    for _, spec in named:
        del spec["operation"]
    return [_parse(name, spec) for name, spec in named]


def _parse(name: str, options: Any) -> Operation:
    if name not in find_operations():
        raise ConfigError(f"attention.{name}", "unknown operation", valid=list_operations())
    if not isinstance(options, Mapping):
        raise ConfigError(f"attention.{name}", "needs its options as keys", given=options)
    spec = find_operations()[name]
    known = [field.name for field in fields(spec)]
    for option in options:
        if option not in known:
            raise ConfigError(f"attention.{name}.{option}", "unknown key", valid=known)
    try:
        parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(spec), dict(options)))
    except OmegaConfBaseException as error:
        path = error.full_key or _find_refused_option(spec, options) or str(error.key)
        option = path.split("[")[0].split(".")[0]
        missing = isinstance(error, MissingMandatoryValue)
        problem = str(error.msg or error).splitlines()[0]
        if "ListConfig, list or tuple" in problem or "with ListConfig" in problem:
            problem = "must be a list"
        raise ConfigError(
            f"attention.{name}.{option}",
            "a value is required here" if missing else problem,
            given=None if missing else repr(options.get(option)),
            valid=_describe_values(spec, option),
        ) from None
    assert isinstance(parsed, Operation)
    _check_finite(parsed, options)
    check_ranges(parsed, f"attention.{name}.")
    parsed.check_options()
    return parsed


def _find_refused_option(spec: type[Operation], options: Mapping[str, Any]) -> str | None:
    """Find the option whose value does not fit, where OmegaConf does not name it."""
    for option, value in options.items():
        try:
            OmegaConf.merge(OmegaConf.structured(spec), {option: value})
        except OmegaConfBaseException:
            return option
    return None


def _check_finite(spec: Operation, options: Mapping[str, Any]) -> None:
    """Check that no option is infinite: no plan or config file can hold infinity."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(
                spec.get_key(field.name),
                "must be finite",
                given=options[field.name],
                valid=_describe_values(type(spec), field.name),
            )


def _describe_values(spec: type[Operation], option: str) -> str | list[str]:
    """Describe what an option accepts: its field's words, the members of an enum, or a type."""
    valid = next((get_valid(field) for field in fields(spec) if field.name == option), None)
    if valid is not None:
        return valid
    kind = get_type_hints(spec).get(option)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.name for member in kind]
    return kind.__name__ if type(kind) is type else str(kind)
