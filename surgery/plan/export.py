"""Decide how the result of a plan can be saved, and which runtimes can serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.attributes import Attributes, to_plain
from surgery.models.own_record import read_recorded_attributes, read_recorded_steps
from surgery.models.reference import (
    ReferenceModels,
    Shapes,
    find_differing_attributes,
    find_first_difference,
    get_shapes,
)
from surgery.models.sites import Site, find_sites
from surgery.plan.draft import Step
from surgery.plan.plan import Export
from surgery.plan.runtimes import find_runtimes


def decide_export(
    after: Sequence[Site],
    shapes: Shapes,
    patch: Mapping[str, Any] | None,
    attributes: Attributes,
    steps: Sequence[Step],
    references: ReferenceModels,
    into: str | None,
) -> Export:
    """Decide the export format: native if the patched config alone gives the result, else record.

    Args:
        patch: what the config must hold; ``None`` if it has no key for it.
        into: the architecture the model is converted to, if it is.
    """
    original = references.get({})
    reason = _find_obstacle(after, shapes, patch, attributes, steps, references)
    native = reason is None
    reference = references.get(patch) if native and patch is not None else original
    name = type(reference).__name__
    served = find_runtimes(
        name,
        native=native,
        explicit_head_dim=_has_explicit_head_dim(after),
        grouped=any(site.group_size > 1 for site in after),
        rope_types=_find_rope_types(reference),
        windowed=_has_short_window(reference, after),
        windows_moved=_have_windows_moved(original, after),
    )
    kind = "native"
    if not native:
        kind = "record"
    elif into is not None:
        kind = "converted"
    reasons = {
        "native": "the architecture's own config says the result",
        "converted": f"as {name}, whose own config says the result",
        "record": f"{reason}; `import surgery` lets transformers rebuild it",
    }
    return Export(
        format=kind,
        reason=reasons[kind],
        runtimes=tuple(runtime for runtime, why in served.items() if not why),
        without={runtime: why for runtime, why in served.items() if why},
    )


def _has_short_window(reference: PreTrainedModel, after: Sequence[Site]) -> bool:
    """Whether a window is shorter than the longest input; a longer one has no effect."""
    longest = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    windows = [site.window for site in after if site.window is not None]
    return bool(windows) and (not isinstance(longest, int) or min(windows) < longest)


def _have_windows_moved(original: PreTrainedModel, after: Sequence[Site]) -> bool:
    had = {site.path for site in find_sites(original).sites if site.window is not None}
    return had != {site.path for site in after if site.window is not None}


def can_config_say(shapes: Shapes, patch: Mapping[str, Any], references: ReferenceModels) -> bool:
    """Whether a model built from the patched config has exactly the tensors of the result."""
    try:
        return find_first_difference(shapes, get_shapes(references.get(patch))) is None
    except ConfigError:
        return False


def _find_obstacle(
    after: Sequence[Site],
    shapes: Shapes,
    patch: Mapping[str, Any] | None,
    attributes: Attributes,
    steps: Sequence[Step],
    references: ReferenceModels,
) -> str | None:
    """Find why the architecture's own config cannot describe the result; ``None`` if it can."""
    original = references.get({})
    config, kind = original.config, original.config.model_type
    recorded = [step.operation for step in steps if step.recorded]
    # And those of earlier operations on this model.
    recorded += [step for step, _ in read_recorded_steps(config)]
    if recorded:
        return f"a {kind} config cannot say what {recorded[0]} did"
    earlier = read_recorded_attributes(config)
    attributes = {
        path: {**earlier.get(path, {}), **attributes.get(path, {})}
        for path in {**earlier, **attributes}
    }
    counts = {
        "KV head": sorted({site.kv_heads for site in after}),
        "query head": sorted({site.q_heads for site in after}),
    }
    if patch is None:
        several = next((what for what, found in counts.items() if len(found) > 1), None)
        if several is None:
            return f"a {kind} config has no key for the result's head counts"
        found = ", ".join(map(str, counts[several]))
        return f"{kind} configs hold one {several} count for all layers; the result has {found}"
    try:
        reference = references.get(patch)
    except ConfigError as error:
        return error.problem
    other = find_first_difference(shapes, get_shapes(reference))
    if other is None and find_sites(reference).sites != tuple(after):
        other = "its attention sites"
    elif other is None:
        other = _find_other_attribute(attributes, original, reference)
    return other and f"a {kind} config does not say the result: a fresh model differs in {other}"


def _find_other_attribute(
    attributes: Attributes, original: PreTrainedModel, reference: PreTrainedModel
) -> str | None:
    """Find an attribute that the plan sets and a model built from the config does not have."""
    for path, values in attributes.items():
        differing = find_differing_attributes(
            original.get_submodule(path), reference.get_submodule(path)
        )
        for name, value in values.items():
            held = vars(reference.get_submodule(path)).get(name)
            if to_plain(held) != value and differing.get(name) != value:
                return f"{path}.{name}"
    return None


def _has_explicit_head_dim(sites: Sequence[Site]) -> bool:
    return any(site.q_heads * site.head_dim != site.hidden_size for site in sites)


def _find_rope_types(reference: PreTrainedModel) -> set[str]:
    """Find every rope type in the config, also per layer type."""
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            if isinstance(value.get("rope_type"), str):
                found.add(value["rope_type"])
            for below in value.values():
                walk(below)

    try:
        walk(getattr(reference.config.get_text_config(), "rope_parameters", None))
    except ValueError:
        walk(getattr(reference.config, "rope_parameters", None))
    return found
