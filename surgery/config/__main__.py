"""`python -m surgery.config`: renew the comments of `conf/`; or print the YAML of an operation."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from surgery.config.comments import Key, describe_keys, rewrite_comments, write_yaml
from surgery.config.schema import RunConfig
from surgery.console import say
from surgery.errors import ConfigError, SurgeryError, refuse
from surgery.plan.registry import find_operations

COMMAND = "python -m surgery.config"
# Their keys belong to Lightning and to the callbacks.
_LEFT_ALONE = ("callbacks", "trainer")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 for an error that the user can correct.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Renew the comments of conf/ from the options in the code."
    )
    parser.add_argument(
        "operation", nargs="?", metavar="attention.NAME", help="print the YAML of one instead"
    )
    options = parser.parse_args(arguments)
    try:
        if options.operation is not None:
            print(write_operation_yaml(options.operation), end="")
            return
        changed = rewrite_folder(Path(str(files("surgery.conf"))))
        say("\n".join(["comments renewed:", *map(str, changed)]) if changed else "nothing to renew")
    except SurgeryError as error:
        refuse(error)


def write_operation_yaml(key: str) -> str:
    """Write `conf/attention/NAME.yaml` for the operation ``attention.NAME``, with its defaults.

    Raises:
        ConfigError: there is no such operation.
    """
    group, _, name = key.partition(".")
    if group != "attention" or name not in find_operations():
        valid = [f"attention.{known}" for known in find_operations()]
        raise ConfigError(key, "there is no such operation", valid=valid)
    kind = find_operations()[name]
    return write_yaml(kind, name, _read_summary(kind))


def _read_summary(kind: type) -> str:
    """Read the first paragraph of a docstring; a dataclass without one has its signature there."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return "" if text.startswith(f"{kind.__name__}(") else text


def rewrite_folder(folder: Path) -> list[Path]:
    """Renew the comments of a folder like `conf/`, and return the files that changed."""
    changed = []
    for path in sorted(folder.rglob("*.yaml")):
        group = path.parent.name if path.parent != folder else ""
        if group in _LEFT_ALONE:
            continue
        old = path.read_text(encoding="utf-8")
        new = rewrite_comments(old, _describe_group(group))
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


def _describe_group(group: str) -> Mapping[str, Key]:
    """Describe the keys of a file in a config group; "" stands for `config.yaml`."""
    if group == "attention":
        return {name: Key(keys=describe_keys(kind)) for name, kind in find_operations().items()}
    keys = describe_keys(RunConfig)
    return keys[group].keys or {} if group else keys


if __name__ == "__main__":
    main()
