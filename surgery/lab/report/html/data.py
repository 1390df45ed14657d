"""What a run directory holds, read as it is; what cannot be read is said, not raised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.lab.report.figures import MOMENT_NAMES
from surgery.lab.report.summary import FORMAT, MOMENTS, SUMMARY

HEADS = "heads.parquet"
# Letters of config.yaml that are kept.
_CONFIG = 200_000
# file → the format that is read
FORMATS = {"plan.json": 4, "importance.json": 1, "analysis/heads.json": 1}
# file that an earlier run may have left → part of the summary of the run that wrote it
_WRITTEN_WITH = {"importance.json": "importance", "analysis/heads.json": "analysis"}


@dataclass(frozen=True)
class RunFiles:
    """The files of a run. A mapping is empty where its file is not there or cannot be read.

    Attributes:
        directory: the run's.
        summary, plan, importance, analysis: the JSON of that name.
        heads: where the table of watched heads is; ``None`` where it is not.
        config: text of `config.yaml`.
        problems: a sentence for each file that could not be read.
    """

    directory: Path
    summary: Mapping[str, Any]
    plan: Mapping[str, Any]
    importance: Mapping[str, Any]
    analysis: Mapping[str, Any]
    heads: Path | None
    config: str
    problems: tuple[str, ...] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """What is known of the source."""
        return self.part("model") or self.plan.get("model") or {}

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.model.get("name") or self.directory.name)

    @property
    def operations(self) -> list[Mapping[str, Any]]:
        """The declared operations, in order."""
        return list(self.summary.get("operations") or self.plan.get("operations") or [])

    @property
    def measured(self) -> dict[str, Mapping[str, Any]]:
        """Moment → its figures, in order, where there are any."""
        return {moment: self.summary[moment] for moment in MOMENTS if self.part(moment)}

    @property
    def before(self) -> Mapping[str, Any]:
        """Figures of the original: measured where they were, planned sizes where not."""
        return self.part("before") or self._read_planned("before")

    @property
    def after(self) -> Mapping[str, Any]:
        """The same of the result."""
        measured = self.part("after_training") or self.part("after_surgery")
        return measured or self._read_planned("after")

    def part(self, name: str) -> Mapping[str, Any]:
        """A part of the summary; empty where the run did not do that."""
        return self.summary.get(name) or {}

    def _read_planned(self, when: str) -> Mapping[str, Any]:
        return self.part("planned").get(when) or self.plan.get(f"sizes_{when}") or {}

    def name_moment(self, moment: str) -> str:
        return MOMENT_NAMES[moment] if self.operations else moment.replace("_", " ")


def read_run(directory: Path) -> RunFiles:
    """Everything of a run that a report is made of.

    An earlier run may have left files in the directory. So where there is a summary, results on
    heads are read only if it says that this run wrote them.
    """
    problems: list[str] = []
    summary = _read_json(directory / SUMMARY, FORMAT, problems)
    plan, importance, analysis = (
        _read_json(directory / name, known, problems) if _is_of_run(name, summary) else {}
        for name, known in FORMATS.items()
    )
    config = directory / "config.yaml"
    return RunFiles(
        directory=directory,
        summary=summary,
        plan=plan,
        importance=importance,
        analysis=analysis,
        heads=_find_heads(directory, summary),
        config=_read_text(config) if config.is_file() else "",
        problems=tuple(problems),
    )


def _is_of_run(name: str, summary: Mapping[str, Any]) -> bool:
    part = _WRITTEN_WITH.get(name)
    return not summary or part is None or bool(summary.get(part))


def _find_heads(directory: Path, summary: Mapping[str, Any]) -> Path | None:
    training = summary.get("training") or {} if summary else {"heads": HEADS}
    # Summaries of earlier versions do not say which table is theirs.
    name = training.get("heads", HEADS) if training else None
    return directory / name if name and (directory / name).is_file() else None


def _read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= _CONFIG else f"{text[:_CONFIG]}\n# cut off here: it is long"


def _read_json(path: Path, known: int, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read and is left out: {error}")
        return {}
    found = data.get("format") if isinstance(data, dict) else None
    if found != known:
        problems.append(f"{path.name} is of format {found}, not {known}, and is left out")
        return {}
    return dict(data)
