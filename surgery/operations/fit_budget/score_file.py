"""The scores in the plan of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.calibration.layer_choices import UNCHANGED, Key
from surgery.errors import ConfigError
from surgery.files import read_json
from surgery.models.sites import Site
from surgery.plan.choice import Choice


def read_scores(
    path: str, sites: Sequence[Site], offered: Sequence[Sequence[Choice]], key: str
) -> list[dict[Key, float]]:
    """Read what each choice of each layer loses: per site, choice → divergence.

    Raises:
        ConfigError: it cannot be read, or holds no score for one of the choices.
    """
    try:
        plan: Any = read_json(Path(path).expanduser())
        chosen = plan["calibration"]["chosen"]
        heads, rows = chosen["heads"], chosen["scores"]
        found = {
            row["layer"]: {(c["operation"], c["choice"]): float(c["kl"]) for c in row["choices"]}
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            key,
            "holds no scores of choices of layers",
            given=path,
            valid="the plan.json of a run with attention=[fit_budget]",
        ) from error
    if heads != [[site.q_heads, site.kv_heads] for site in sites]:
        raise ConfigError(
            key, "is about a model with other heads", given=path, valid="a plan of the same model"
        )
    losses = []
    for site, choices in zip(sites, offered, strict=True):
        own = found.get(site.layer, {})
        for wanted in (UNCHANGED, *(choice.key for choice in choices)):
            if not math.isfinite(own.get(wanted, math.nan)):
                raise ConfigError(
                    key,
                    f"has no score for layer {site.layer}: {' '.join(wanted).strip()}",
                    given=path,
                    valid="the plan of the same model and choices",
                )
        losses.append({wanted: own[wanted] for wanted in (UNCHANGED, *(c.key for c in choices))})
    return losses
