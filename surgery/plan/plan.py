"""The plan itself: everything an executor needs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.anatomy import Site
from surgery.errors import PlanError
from surgery.plan.edits import SiteChange, TensorEdit
from surgery.plan.sizes import Sizes

FORMAT = 1


@dataclass(frozen=True)
class Export:
    """How the result can be saved.

    Attributes:
        format: ``native`` (the architecture's own config says it) or ``none``.
        reason: why, in a sentence.
        runtimes: what can serve it.
    """

    format: str
    reason: str
    runtimes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Ordered changes from one model to another.

    Attributes:
        model: name, class and type of the source.
        operations: the specs, as JSON.
        changes: per operation and site, in order.
        before, after: the sites of the source and of the result.
        config_patch: dotted config keys and their new values.
        sizes_before, sizes_after: predicted, at `tokens` tokens and `kv_bytes` bytes per value.
        export: how the result can be saved.
    """

    model: Mapping[str, str]
    operations: tuple[Mapping[str, Any], ...]
    changes: tuple[SiteChange, ...]
    before: tuple[Site, ...]
    after: tuple[Site, ...]
    config_patch: Mapping[str, Any]
    tokens: int
    kv_bytes: int
    sizes_before: Sizes
    sizes_after: Sizes
    export: Export

    @property
    def edits(self) -> list[TensorEdit]:
        return [edit for change in self.changes for edit in change.edits]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "operations": [dict(spec) for spec in self.operations],
            "changes": [change.to_json() for change in self.changes],
            "before": [site.to_json() for site in self.before],
            "after": [site.to_json() for site in self.after],
            "config_patch": dict(self.config_patch),
            "tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
            "sizes_before": self.sizes_before.to_json(),
            "sizes_after": self.sizes_after.to_json(),
            "export": asdict(self.export),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote. Data only: nothing named in it is imported or called.

        Raises:
            PlanError: another format.
        """
        if data.get("format") != FORMAT:
            raise PlanError(f"a plan of format {data.get('format')}; this version reads {FORMAT}")
        export = data["export"]
        return cls(
            model=dict(data["model"]),
            operations=tuple(dict(spec) for spec in data["operations"]),
            changes=tuple(SiteChange.from_json(change) for change in data["changes"]),
            before=tuple(Site.from_json(site) for site in data["before"]),
            after=tuple(Site.from_json(site) for site in data["after"]),
            config_patch=dict(data["config_patch"]),
            tokens=data["tokens"],
            kv_bytes=data["kv_bytes"],
            sizes_before=Sizes(**data["sizes_before"]),
            sizes_after=Sizes(**data["sizes_after"]),
            export=Export(export["format"], export["reason"], tuple(export["runtimes"])),
        )
