"""The plan: everything that `apply_` needs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from surgery.config.hints import Count, find_misfit
from surgery.errors import PlanError
from surgery.models.sites import Block, Site
from surgery.plan.draft import Step
from surgery.plan.operation import SHARE_KV
from surgery.plan.parallel import check_tensor_parallel
from surgery.plan.resolution import Resolution
from surgery.plan.sizes import Sizes
from surgery.transforms.edits import SiteChange, TensorEdit

FORMAT = 4


@dataclass(frozen=True)
class Export:
    """How the result can be saved.

    Attributes:
        format: ``native`` (the architecture's own config says it), ``converted`` (that of the
            architecture it was converted to does) or ``record`` (rebuilt after `import surgery`).
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
        outcomes: per operation, what it does to this model, in words.
        conversion: arguments of `surgery.models.convert.convert_model`, where the model changes
            architecture before anything else.
        changes: per operation and site, in order.
        source, before, after: the sites of the source, of the converted source (the same where
            nothing is converted), and of the result.
        left_alone: attention that no operation can change, and why.
        layers: site path → column → what happens there, in words, for tables.
        attributes: module path → attribute → value, set by operations, by config keys or
            directly.
        head_attributes: the same for what follows from changed head counts: what the
            architecture's own code would have set on the changed sites besides their tensors.
        config_patch: dotted config keys that operations set, and their new values.
        head_patch: the keys that follow from changed head counts.
        steps: what else is done to the live model, in order.
        implementation: the attention implementation that operations chose; ``None`` where none
            did.
        notes: sentences to read with the plan.
        open_decisions: what calibration still has to decide.
        calibration: what calibration saw and chose, as JSON; ``None`` where nothing was calibrated.
        resolved: names of the tensors that calibration made, each with its SHA-256.
        sizes_before, sizes_after: predicted, at `tokens` tokens and `kv_bytes` bytes per value.
        export: how the result can be saved.
        tensors: the calibrated tensors themselves. JSON holds their digests alone.
        resolutions: what calibration decided, by the operation's place; not in JSON.
        loaded: whether it was read, so that it may be somebody else's; not in JSON.
    """

    model: Mapping[str, str]
    operations: tuple[Mapping[str, Any], ...]
    outcomes: tuple[str, ...]
    conversion: Mapping[str, Any] | None
    changes: tuple[SiteChange, ...]
    source: tuple[Site, ...]
    before: tuple[Site, ...]
    after: tuple[Site, ...]
    left_alone: tuple[Block, ...]
    layers: Mapping[str, Mapping[str, str]]
    attributes: Mapping[str, Mapping[str, Any]]
    head_attributes: Mapping[str, Mapping[str, Any]]
    config_patch: Mapping[str, Any]
    head_patch: Mapping[str, Any]
    steps: tuple[Step, ...]
    implementation: str | None
    notes: tuple[str, ...]
    open_decisions: tuple[str, ...]
    calibration: Mapping[str, Any] | None
    resolved: Mapping[str, str]
    tokens: Count
    kv_bytes: Count
    sizes_before: Sizes
    sizes_after: Sizes
    export: Export
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    resolutions: Mapping[int, Resolution] = field(default_factory=dict, repr=False, compare=False)
    loaded: bool = field(default=False, repr=False, compare=False)

    @property
    def changes_anything(self) -> bool:
        """Whether performing the plan changes the model, or may, as long as something is open."""
        return bool(
            self.changes
            or self.steps
            or self.conversion
            or self.config_patch
            or self.attributes
            or self.open_decisions
        )

    @property
    def shares_kv(self) -> bool:
        """Whether the result needs eager attention with shared KV heads."""
        return any(step.kind == SHARE_KV for step in self.steps)

    @property
    def removed(self) -> tuple[Site, ...]:
        """Sites whose attention is removed completely."""
        left = {site.path for site in self.after}
        return tuple(site for site in self.before if site.path not in left)

    @property
    def edits(self) -> list[TensorEdit]:
        return [edit for change in self.changes for edit in change.edits]

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor that calibration has to make."""
        return {spec.name: spec.shape for edit in self.edits for spec in edit.resolved}

    @property
    def is_resolved(self) -> bool:
        """Whether no decision is left to calibration or training."""
        return set(self.wanted) <= set(self.resolved) and not self.open_decisions

    def check_tensor_parallel(self, degree: int) -> None:
        """Check that `degree` devices can share the heads of every layer of the result evenly.

        Raises:
            ConfigError: they cannot; it names the layers, their heads, and the degrees that can.
        """
        check_tensor_parallel(self.after, degree)

    def get_inputs(self, edit: TensorEdit) -> list[torch.Tensor]:
        """Get the calibrated tensors that an edit needs in addition to its sources.

        Raises:
            PlanError: they are not made yet, or were not loaded with the plan.
        """
        found = []
        for spec in edit.resolved:
            tensor = self.tensors.get(spec.name)
            if tensor is None:
                state = "was loaded without" if spec.name in self.resolved else "still needs"
                raise PlanError(
                    f"{edit.results[0].name}: the plan {state} its calibrated tensors "
                    "(surgery.make_calibrated_plan makes them, surgery.load_plan reads them)"
                )
            found.append(tensor)
        return found

    def fill_zeros(self) -> Plan:
        """Make the same plan with zeros for calibrated tensors, where weights are loaded later."""
        zeros = {name: torch.zeros(shape) for name, shape in self.wanted.items()}
        return replace(self, tensors=zeros)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "operations": [dict(spec) for spec in self.operations],
            "outcomes": list(self.outcomes),
            "conversion": None if self.conversion is None else dict(self.conversion),
            "changes": [change.to_json() for change in self.changes],
            "source": [site.to_json() for site in self.source],
            "before": [site.to_json() for site in self.before],
            "after": [site.to_json() for site in self.after],
            "left_alone": [asdict(block) for block in self.left_alone],
            "layers": _copy_nested(self.layers),
            "attributes": _copy_nested(self.attributes),
            "head_attributes": _copy_nested(self.head_attributes),
            "config_patch": dict(self.config_patch),
            "head_patch": dict(self.head_patch),
            "steps": [asdict(step) for step in self.steps],
            "implementation": self.implementation,
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
                read and filled with `fill_zeros`, but not performed.

        Raises:
            PlanError: the data is of another format, or is not a complete plan.
        """
        version = data.get("format")
        if type(version) is not int or version != FORMAT:
            raise PlanError(f"a plan of format {version}; this version reads {FORMAT}")
        misfit = find_misfit({key: data[key] for key in data if key != "format"}, cls)
        for number, spec in enumerate(data["operations"] if misfit is None else ()):
            misfit = misfit or find_misfit(spec.get("operation"), str, f"operations[{number}]")
        if misfit is not None:
            raise PlanError(f"not a complete plan: {misfit}")
        try:
            return cls._read(data, dict(tensors or {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a complete plan: {type(error).__name__} {error}") from None

    @classmethod
    def _read(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Plan:
        export = data["export"]
        return cls(
            model=dict(data["model"]),
            operations=tuple(dict(spec) for spec in data["operations"]),
            outcomes=tuple(data["outcomes"]),
            conversion=None if data["conversion"] is None else dict(data["conversion"]),
            changes=tuple(SiteChange.from_json(change) for change in data["changes"]),
            source=tuple(Site.from_json(site) for site in data["source"]),
            before=tuple(Site.from_json(site) for site in data["before"]),
            after=tuple(Site.from_json(site) for site in data["after"]),
            left_alone=tuple(Block(**block) for block in data["left_alone"]),
            layers=_copy_nested(data["layers"]),
            attributes=_copy_nested(data["attributes"]),
            head_attributes=_copy_nested(data["head_attributes"]),
            config_patch=dict(data["config_patch"]),
            head_patch=dict(data["head_patch"]),
            steps=tuple(Step(**step) for step in data["steps"]),
            implementation=data["implementation"],
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
            loaded=True,
        )


def _copy_nested(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: dict(values) for name, values in nested.items()}
