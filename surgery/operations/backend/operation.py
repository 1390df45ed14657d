"""`backend`: which code computes attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from surgery.config.options import POSITIVE, option
from surgery.errors import ConfigError
from surgery.models.dropout import find_dropout_attributes
from surgery.operations.backend.available import (
    FAST,
    Need,
    choose_backend,
    find_obstacle,
    find_warning,
    list_available,
)
from surgery.operations.backend.switch import set_backend
from surgery.plan.draft import Draft
from surgery.plan.operation import Operation, StepFunction


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

    name = "backend"
    steps: ClassVar[Mapping[str, StepFunction]] = {"backend": set_backend}
    runs_only = True

    implementation: str = option(
        MISSING,
        "eager | sdpa | flash_attention_2, 3, 4 | flex_attention | hub kernel org/repo | fast",
    )
    check: bool = option(True, "compare logits with eager's on the first batch")
    tolerance: float | None = option(
        None,
        "in parts of the logits' standard deviation; null: by dtype",
        range=POSITIVE,
        valid="a number above 0, or null to go by the dtype",
    )

    def plan(self, draft: Draft) -> None:
        need = Need(
            model=draft.model,
            device=draft.context.device,
            head_dims=tuple(sorted({site.head_dim for site in draft.sites})),
            dropout=_find_planned_dropout(draft),
        )
        chosen = self.implementation
        if chosen == FAST:
            chosen, line = choose_backend(need)
            draft.notes.append(line)
        else:
            self._check(need)
        caution = find_warning(chosen, need)
        if caution:
            draft.notes.append(caution)
        arguments = {"implementation": chosen, "check": self.check, "tolerance": self.tolerance}
        draft.add_step("backend", arguments)
        draft.implementation = chosen

    def _check(self, need: Need) -> None:
        reason = find_obstacle(self.implementation, need)
        if reason:
            raise ConfigError(
                self.get_key("implementation"),
                reason,
                given=self.implementation,
                valid=[*list_available(need), FAST],
            )


def _find_planned_dropout(draft: Draft) -> float:
    """Find the highest attention dropout of any site, as the operations so far leave it."""
    planned = [
        float(draft.get_value(path, name))
        for site in draft.sites
        if site.path not in draft.removed
        for path, name in find_dropout_attributes(draft.model, site)
    ]
    return max(planned, default=0.0)
