"""The plan itself: everything an executor needs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.anatomy import Block, Site
from surgery.errors import PlanError
from surgery.plan.edits import SiteChange, TensorEdit
from surgery.plan.operation import Step
from surgery.plan.sizes import Sizes

FORMAT = 2


@dataclass(frozen=True)
class Export:
    """How the result can be saved.

    Attributes:
        format: ``native`` (the architecture's own config says it), ``re-housed`` (that of the
            architecture it was re-housed in does) or ``record`` (rebuilt after `import surgery`).
        reason: why, in a sentence.
        runtimes: what can serve it.
        without: runtime → why it cannot.
    """

    format: str
    reason: str
    runtimes: tuple[str, ...]
    without: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """Ordered changes from one model to another.

    Attributes:
        model: name, class and type of the source.
        operations: the specs, as JSON.
        rehousing: arguments of `surgery.rehouse.rehouse`, where the model changes architecture
            before anything else.
        changes: per operation and site, in order.
        source, before, after: the sites of the source, of the re-housed source (the same where
            nothing is re-housed), and of the result.
        left_alone: attention that no operation is about, and why.
        attributes: module path → attribute → value: what the architecture's own code would have
            set on the changed sites besides their tensors.
        config_patch: dotted config keys and their new values.
        steps: what is done to the live model besides, in order.
        notes: sentences to read with the plan.
        sizes_before, sizes_after: predicted, at `tokens` tokens and `kv_bytes` bytes per value.
        export: how the result can be saved.
    """

    model: Mapping[str, str]
    operations: tuple[Mapping[str, Any], ...]
    rehousing: Mapping[str, Any] | None
    changes: tuple[SiteChange, ...]
    source: tuple[Site, ...]
    before: tuple[Site, ...]
    after: tuple[Site, ...]
    left_alone: tuple[Block, ...]
    attributes: Mapping[str, Mapping[str, Any]]
    config_patch: Mapping[str, Any]
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    tokens: int
    kv_bytes: int
    sizes_before: Sizes
    sizes_after: Sizes
    export: Export

    @property
    def changes_anything(self) -> bool:
        """Whether performing it leaves another model than before."""
        return bool(self.changes or self.steps or self.rehousing or self.config_patch)

    @property
    def edits(self) -> list[TensorEdit]:
        return [edit for change in self.changes for edit in change.edits]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "operations": [dict(spec) for spec in self.operations],
            "rehousing": None if self.rehousing is None else dict(self.rehousing),
            "changes": [change.to_json() for change in self.changes],
            "source": [site.to_json() for site in self.source],
            "before": [site.to_json() for site in self.before],
            "after": [site.to_json() for site in self.after],
            "left_alone": [asdict(block) for block in self.left_alone],
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            "config_patch": dict(self.config_patch),
            "steps": [asdict(step) for step in self.steps],
            "notes": list(self.notes),
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
            PlanError: another format, or no plan at all.
        """
        if data.get("format") != FORMAT:
            raise PlanError(f"a plan of format {data.get('format')}; this version reads {FORMAT}")
        try:
            return cls._read(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a whole plan: {type(error).__name__} {error}") from None

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Plan:
        export = data["export"]
        return cls(
            model=dict(data["model"]),
            operations=tuple(dict(spec) for spec in data["operations"]),
            rehousing=None if data["rehousing"] is None else dict(data["rehousing"]),
            changes=tuple(SiteChange.from_json(change) for change in data["changes"]),
            source=tuple(Site.from_json(site) for site in data["source"]),
            before=tuple(Site.from_json(site) for site in data["before"]),
            after=tuple(Site.from_json(site) for site in data["after"]),
            left_alone=tuple(Block(**block) for block in data["left_alone"]),
            attributes={path: dict(values) for path, values in data["attributes"].items()},
            config_patch=dict(data["config_patch"]),
            steps=tuple(Step(**step) for step in data["steps"]),
            notes=tuple(data["notes"]),
            tokens=data["tokens"],
            kv_bytes=data["kv_bytes"],
            sizes_before=Sizes(**data["sizes_before"]),
            sizes_after=Sizes(**data["sizes_after"]),
            export=Export(**{**export, "runtimes": tuple(export["runtimes"])}),
        )
