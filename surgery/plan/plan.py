"""The plan itself: everything an executor needs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from surgery.anatomy import Block, Site
from surgery.errors import PlanError
from surgery.plan.edits import SiteChange, TensorEdit
from surgery.plan.operation import Step
from surgery.plan.resolution import Resolution
from surgery.plan.sizes import Sizes

FORMAT = 3


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
        open_decisions: what the plan only assumes until calibration decides it.
        calibration: what calibration saw and chose, as JSON; ``None`` where nothing was calibrated.
        resolved: names of the tensors that calibration made, each with its SHA-256.
        sizes_before, sizes_after: predicted, at `tokens` tokens and `kv_bytes` bytes per value.
        export: how the result can be saved.
        tensors: the calibrated tensors themselves. JSON holds their digests alone.
        resolutions: what it was made with, by the operation's place; not in JSON.
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
    open_decisions: tuple[str, ...]
    calibration: Mapping[str, Any] | None
    resolved: Mapping[str, str]
    tokens: int
    kv_bytes: int
    sizes_before: Sizes
    sizes_after: Sizes
    export: Export
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    resolutions: Mapping[int, Resolution] = field(default_factory=dict, repr=False, compare=False)

    @property
    def changes_anything(self) -> bool:
        """Whether performing it leaves another model than before."""
        return bool(self.changes or self.steps or self.rehousing or self.config_patch)

    @property
    def edits(self) -> list[TensorEdit]:
        return [edit for change in self.changes for edit in change.edits]

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor that calibration has to make."""
        return {spec.name: spec.shape for edit in self.edits for spec in edit.resolved}

    @property
    def is_resolved(self) -> bool:
        """Whether it is closed: no decision is left to calibration or training."""
        return set(self.wanted) <= set(self.resolved) and not self.open_decisions

    def inputs(self, edit: TensorEdit) -> list[torch.Tensor]:
        """The calibrated tensors that an edit takes besides its sources.

        Raises:
            PlanError: they were not made yet, or not read with the plan.
        """
        found = []
        for spec in edit.resolved:
            tensor = self.tensors.get(spec.name)
            if tensor is None:
                state = "was read without" if spec.name in self.resolved else "waits for"
                raise PlanError(
                    f"{edit.results[0].name}: the plan {state} its calibrated tensors "
                    "(surgery.calibrated_plan makes them, surgery.load_plan reads them)"
                )
            found.append(tensor)
        return found

    def hollow(self) -> Plan:
        """The same with zeros for calibrated tensors: for structure alone, weights to follow."""
        zeros = {name: torch.zeros(shape) for name, shape in self.wanted.items()}
        return replace(self, tensors=zeros)

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
            "open_decisions": list(self.open_decisions),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "resolved": dict(self.resolved),
            "tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
            "sizes_before": self.sizes_before.to_json(),
            "sizes_after": self.sizes_after.to_json(),
            "export": asdict(self.export),
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Plan:
        """Read what `to_json` wrote. Data only: nothing named in it is imported or called.

        Args:
            tensors: the calibrated tensors, where there are any; without them the plan can be
                read and made `hollow`, not performed.

        Raises:
            PlanError: another format, or no plan at all.
        """
        if data.get("format") != FORMAT:
            raise PlanError(f"a plan of format {data.get('format')}; this version reads {FORMAT}")
        try:
            return cls._read(data, dict(tensors or {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a whole plan: {type(error).__name__} {error}") from None

    @classmethod
    def _read(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Plan:
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
            open_decisions=tuple(data["open_decisions"]),
            calibration=None if data["calibration"] is None else dict(data["calibration"]),
            resolved=dict(data["resolved"]),
            tokens=data["tokens"],
            kv_bytes=data["kv_bytes"],
            sizes_before=Sizes(**data["sizes_before"]),
            sizes_after=Sizes(**data["sizes_after"]),
            export=Export(**{**export, "runtimes": tuple(export["runtimes"])}),
            tensors=tensors,
        )
