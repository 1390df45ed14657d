"""Which attention block of a teacher belongs to which of the model."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import ConfigError
from surgery.plan.plan import Plan

# Paths of two output projections: the model's, and the teacher's.
Pair = tuple[str, str]


def pair_with_original(plan: Plan) -> list[Pair]:
    """Pair each site of a plan's result with itself in the original.

    Raises:
        ConfigError: there are none.
    """
    return pair_sites(plan, {site.path: site.output.path for site in plan.source})


def pair_sites(plan: Plan, teacher: Mapping[str, str], *, same_depth: bool = True) -> list[Pair]:
    """Pair each site of a plan's result with one of the teacher's.

    By path, where the teacher has all of the result's, or all of the source's before the model was
    converted; else by order, where there are as many. Sites without attention are left out.

    Args:
        teacher: path of the site → path of its output projection, in module order.
        same_depth: whether the teacher has as many layers, so that a site of its own can only be
            one whose attention was removed from the model.

    Raises:
        ConfigError: the two cannot be paired, or there is no attention left.
    """
    if not plan.after:
        raise ConfigError("objective.attention_weight", "the model has no attention to match")
    number = {site.path: index for index, site in enumerate(plan.before)}
    numbers = [number[site.path] for site in plan.after]
    own_paths = [site.output.path for site in plan.after]
    for paths in (
        [site.path for site in plan.after],
        [plan.source[index].path for index in numbers],
    ):
        if set(paths) <= set(teacher) and (same_depth or len(paths) == len(teacher)):
            return [
                (own_path, teacher[path]) for own_path, path in zip(own_paths, paths, strict=True)
            ]
    teacher_paths = list(teacher.values())
    if len(teacher_paths) == len(own_paths):
        return list(zip(own_paths, teacher_paths, strict=True))
    if len(teacher_paths) == len(plan.source):
        return [
            (own_path, teacher_paths[index])
            for own_path, index in zip(own_paths, numbers, strict=True)
        ]
    raise ConfigError(
        "objective.attention_weight",
        "the attention blocks of the model and of its teacher differ in number and names, so they "
        "cannot be paired",
        given=f"{len(own_paths)} in the model, {len(teacher_paths)} in the teacher",
        valid="0, or a teacher with as many",
    )
