"""`backend`: which code computes attention."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from surgery.architecture.backends import FAST, Need, available, choose, obstacle, warning
from surgery.architecture.dropouts import planned_dropout
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.plan.operation import Draft, Operation, Step


@operation("backend")
@dataclass
class Backend(Operation):
    """Options of `attention.backend`.

    Attributes:
        implementation: a name of transformers, a kernel of the hub (``org/repo``, with ``@rev``
            and ``:function`` where needed), or ``fast``: the best that is really there.
        check: compare with eager on the first batch.
        tolerance: how far the logits may lie apart then, in parts of their standard deviation;
            ``None`` goes by the dtype.
    """

    implementation: str = MISSING
    check: bool = True
    tolerance: float | None = None

    def plan(self, draft: Draft) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(
                self.key("tolerance"),
                "must be greater than zero",
                given=self.tolerance,
                valid="a number, or null to go by the dtype",
            )
        need = Need(
            model=draft.skeleton,
            device=draft.context.device,
            head_dims=tuple(sorted({site.head_dim for site in draft.sites})),
            dropout=planned_dropout(draft),
        )
        chosen = self.implementation
        if chosen == FAST:
            chosen, line = choose(need)
            draft.notes.append(line)
        else:
            self._check(need)
        caution = warning(chosen, need)
        if caution:
            draft.notes.append(caution)
        arguments = {"implementation": chosen, "check": self.check, "tolerance": self.tolerance}
        draft.steps.append(Step(self.name, "backend", arguments))

    def _check(self, need: Need) -> None:
        reason = obstacle(self.implementation, need)
        if reason:
            raise ConfigError(
                self.key("implementation"),
                reason,
                given=self.implementation,
                valid=[*available(need), FAST],
            )
