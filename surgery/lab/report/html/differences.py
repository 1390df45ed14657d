"""What the configs of several runs do not have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from surgery.lab.report.html.data import RunFiles

OPERATIONS = "operations"
# Keys that are given a column of their own.
_COLUMNS = 6
# Where a run lies is no difference.
_PLACES = ("run_dir", "hydra")


def differences(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """Dotted config key → its value in every run, for keys whose values are not all the same.

    ``None`` where a run does not have the key. `operations` names them, where they differ.
    """
    configs = [dict(_flat(_config(run), "")) for run in runs]
    names = [", ".join(str(spec["operation"]) for spec in run.operations) for run in runs]
    for config, name in zip(configs, names, strict=True):
        config[OPERATIONS] = name
    keys = {key: None for config in configs for key in config}
    found = {}
    for key in keys:
        values = [_plain(run, config.get(key)) for run, config in zip(runs, configs, strict=True)]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


def main_differences(differ: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The few of them to look at first: what most runs have, the operations' options foremost."""
    common = [k for k, values in differ.items() if 2 * values.count(None) <= len(values)]
    common.sort(key=lambda key: (key != OPERATIONS, not key.startswith("attention.")))
    return {key: differ[key] for key in common[:_COLUMNS]}


def _config(run: RunFiles) -> Mapping[str, Any]:
    if run.config:
        try:
            plain = OmegaConf.to_container(OmegaConf.create(run.config))
        except (OmegaConfBaseException, YAMLError):
            plain = None
        if isinstance(plain, dict):
            return {str(key): value for key, value in plain.items() if key not in _PLACES}
    return {"attention": {spec["operation"]: dict(spec) for spec in run.operations}}


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _plain(run: RunFiles, value: Any) -> Any:
    """A value to be shown and compared; paths below the run's own directory are the same in all."""
    if value is None or isinstance(value, int | float):
        return value
    return str(value).replace(str(run.directory.resolve()), "RUN_DIR")
