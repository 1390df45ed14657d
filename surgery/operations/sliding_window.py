"""`sliding_window`: attention that looks back over a few tokens only (arXiv:2004.05150).

A query sees itself and the `size` - 1 tokens before it, and the cache keeps no more than it needs.
What a model's config has to say for that differs between architectures, so it is asked of their own
code: the mask functions and the cache that a model of the changed config uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from surgery.config.options import Range, option
from surgery.errors import ConfigError, PlanError, get_first_line
from surgery.models.attributes import Attributes, setting_attributes
from surgery.models.config import get_config_part, get_key, patching_config
from surgery.models.convert import list_targets
from surgery.models.forward import evaluating, make_probe_inputs, using_implementation
from surgery.models.reference import ReferenceModels
from surgery.models.rotary import list_nested_types
from surgery.models.sites import Site, find_sites, get_text_config
from surgery.plan.draft import Draft
from surgery.plan.layers import LAYERS_HELP, select_sites
from surgery.plan.operation import Conversion, Operation
from surgery.plan.plan import Plan
from surgery.verify.equivalence import (
    FAULTS,
    choose_tolerance,
    compute_relative_distance,
)
from surgery.verify.masks import count_visible_keys
from surgery.verify.reach import probe_reach

FULL, SLIDING = "full_attention", "sliding_attention"
SIZE, TYPES, USED = "sliding_window", "layer_types", "use_sliding_window"
# Of the check on a live model: any size shows whether a layer has a window.
_TRIED, _WIDE = 4, 4096


@dataclass
class SlidingWindow(Operation):
    """Options of `attention.sliding_window`.

    Attributes:
        size: tokens that a query sees, itself included; ``None`` takes the window away.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "sliding_window"

    size: int | None = option(
        MISSING,
        "tokens that a query sees, itself included; null takes the window away",
        range=Range(2),
        valid="a whole number from 2 on, or null for no window",
    )
    layers: list[int] | None = option(None, LAYERS_HELP)

    def choose_conversion(self, model: PreTrainedModel) -> Conversion | None:
        if self.size is None or self.layers is not None or _has_key(model.config.get_text_config()):
            return None
        for target, obstacle in list_targets(model.config).items():
            if not obstacle and hasattr(CONFIG_MAPPING[target](), SIZE):
                return Conversion(target)
        return None  # `plan` refuses, with the reason

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        other = [site for site in sites if not site.cached]
        if other and (self.layers is not None or len(other) == len(sites)):
            raise ConfigError(
                f"attention.{self.name}",
                f"{other[0].path} is not causal self-attention, and only that can have a window",
                given=self.size,
                valid="layers that are",
            )
        sites = [site for site in sites if site.cached]
        if all(site.window == self.size for site in sites):
            draft.notes.append(f"{self.name}: the model has this window already")
            return
        patch: dict[str, Any] = {}
        chosen = {site.path for site in sites}
        left = [s for s in draft.sites if s.cached and s.path not in draft.removed]
        for prefix in sorted({site.config_prefix for site in sites}):
            config_sites = [site for site in left if site.config_prefix == prefix]
            wanted = {s.path: self.size if s.path in chosen else s.window for s in config_sites}
            patch |= self._make_patch(draft, prefix, config_sites, wanted)
        self._check(draft, sites, patch)
        for key, value in patch.items():
            draft.set_config(key, value)
        for site in sites:
            draft.set_cell(
                site.path, "window", "none" if self.size is None else f"{self.size} tokens"
            )
        longest = getattr(get_text_config(draft.config), "max_position_embeddings", None)
        if self.size is not None and isinstance(longest, int) and self.size >= longest:
            draft.notes.append(
                f"{self.name}: a window of {self.size} tokens hides nothing, the model is for "
                f"{longest} positions"
            )

    def _make_patch(
        self, draft: Draft, prefix: str, sites: Sequence[Site], wanted: Mapping[str, int | None]
    ) -> dict[str, Any]:
        """Make the dotted config keys that change, and their values."""
        config = get_config_part(draft.config, prefix)
        sizes = sorted({size for size in wanted.values() if size is not None})
        if not _has_key(config):
            self._refuse_config(draft, config)
        if len(sizes) > 1:
            raise ConfigError(
                self.get_key("layers"),
                f"a {config.model_type} config has one window for all layers that have any",
                given=f"windows of {' and '.join(map(str, sizes))} tokens",
                valid="null for all, or the size that the other layers have",
            )
        changed: dict[str, Any] = {SIZE: sizes[0] if sizes else None}
        if hasattr(config, USED):
            changed[USED] = bool(sizes)
        types = getattr(config, TYPES, None)
        if types:
            changed[TYPES] = self._choose_types(draft, config, sites, wanted)
            if not sizes:  # the layer types say it, and some configs take no null
                del changed[SIZE]
        elif len(set(wanted.values())) > 1:
            raise ConfigError(
                self.get_key("layers"),
                f"a {config.model_type} config has one window for all layers",
                given=self.layers,
                valid="null for all",
            )
        return {
            f"{prefix}{name}": value
            for name, value in changed.items()
            if value != getattr(config, name, None)
        }

    def _choose_types(
        self, draft: Draft, config: Any, sites: Sequence[Site], wanted: Mapping[str, int | None]
    ) -> list[str]:
        types = list(getattr(config, TYPES))
        by_position = set(list_nested_types(config))
        for site in sites:
            layer = draft.model.get_submodule(site.path).layer_idx
            assert isinstance(layer, int)
            kind = FULL if wanted[site.path] is None else SLIDING
            if (site.window is None) == (wanted[site.path] is None) or types[layer] == kind:
                continue
            if types[layer] not in (FULL, SLIDING):
                raise ConfigError(
                    self.get_key("layers"),
                    f"{site.path} is of type {types[layer]}, which no window is for",
                    given=site.layer,
                    valid=f"layers of type {FULL} or {SLIDING}",
                )
            rope = getattr(config, "rope_parameters", None) or {}
            if by_position and rope.get(types[layer]) != rope.get(kind):
                raise ConfigError(
                    self.get_key("layers"),
                    f"in a {config.model_type} layers with and without a window have different "
                    f"rotary positions, so the positions of {site.path} would change too",
                    given=site.layer,
                    valid=f"layers of type {kind}",
                )
            types[layer] = kind
        return types

    def _refuse_config(self, draft: Draft, config: Any) -> None:
        reasons = list_targets(draft.model.config).items()
        convertible = [name for name, reason in reasons if not reason]
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)
        if convertible and self.size is not None:
            raise ConfigError(
                f"attention.{self.name}",
                f"a {config.model_type} config cannot say a window; the model can be converted to "
                f"{convertible[0]}, whose config has one for all layers",
                given=self.layers if self.layers is not None else draft.name,
                valid="this operation first in the list, with layers null",
            )
        raise ConfigError(
            f"attention.{self.name}",
            f"a {config.model_type} config cannot say a window, and the model cannot be converted "
            f"to an architecture that can ({why})",
            given=self.size,
            valid="a model whose config has `sliding_window`",
        )

    def _check(self, draft: Draft, sites: Sequence[Site], patch: Mapping[str, Any]) -> None:
        """Check that a model of the changed config masks and caches as asked, and nothing else."""
        before = draft.references.get(draft.patch)
        after = draft.references.get({**draft.patch, **patch})
        cached = {site.path: site.window for site in find_sites(after).sites}
        position = (self.size or 0) + max((s.window or 0 for s in draft.sites), default=0) + 8
        visible, reached = (count_visible_keys(model, position) for model in (after, before))
        chosen = {site.path for site in sites}
        for site in draft.sites:
            if site.path in draft.removed or not site.cached:
                continue
            wanted = self.size if site.path in chosen else site.window
            seen = visible.get(site.path)
            right = seen == (wanted or position + 1) or (seen is None and site.path not in reached)
            if cached.get(site.path) != wanted or not right:
                raise ConfigError(
                    f"attention.{self.name}",
                    f"a {type(after).__name__} does not follow its config: {site.path} "
                    f"would see {'nothing' if seen is None else f'{seen} tokens'} at position "
                    f"{position}, and have a cache for a window of {cached.get(site.path)}",
                    given=self.size,
                    valid="a model whose layers follow `sliding_window`",
                )
        could, can = (probe_reach(model, sorted(chosen)) for model in (before, after))
        for path, reach in can.items():
            if path in could and could[path].rotations != reach.rotations:
                raise ConfigError(
                    f"attention.{self.name}",
                    f"{path} has rotary positions {'only' if reach.rotations else 'unless it is'} "
                    "with a window, so its positions would change too",
                    given=self.size,
                    valid="layers that have a window already",
                )

    @classmethod
    def verify(cls, model: PreTrainedModel, plan: Plan, probe: Mapping[str, Any] | None) -> None:
        """Compare a short window with a mask that hides the same keys."""
        window_patch = {
            key: value
            for key, value in plan.config_patch.items()
            if key.rpartition(".")[2] in (SIZE, TYPES, USED)
        }
        if not window_patch:
            return
        references = ReferenceModels(model)
        # Of the model as it is now: blocks whose attention is removed later still attend.
        known = {site.path for site in plan.before}
        windowed = [
            site.path
            for site in find_sites(references.get(window_patch)).sites
            if site.window is not None and site.path in known
        ]
        sizes = {f"{site.config_prefix}{SIZE}" for site in (*plan.before, *plan.after)}
        short = {**window_patch, **dict.fromkeys((k for k in sizes if windowed), _TRIED)}
        wide: dict[str, Any] = {
            key: _WIDE for key in sizes if get_key(model.config, key) is not None
        }
        wide |= {key: True for key, value in window_patch.items() if key.endswith(USED) and value}
        try:
            with evaluating(model), using_implementation(model, "eager"), torch.no_grad():
                actual = _compute_logits(model, references.find_attributes(short), short, [], probe)
                attributes = references.find_attributes(wide)
                expected = _compute_logits(model, attributes, wide, windowed, probe)
        except FAULTS as error:
            raise PlanError(
                f"the window cannot be tried on the model: {get_first_line(error)}"
            ) from None
        distance = compute_relative_distance(actual, expected)
        if not distance <= choose_tolerance(model):
            raise PlanError(
                f"the model with a window is not the model under a mask that hides the same keys: "
                f"its output would be off by {distance:.2g} of its size"
            )


def _has_key(config: Any) -> bool:
    """Whether one key says the window; transformers raises where it is different in each layer."""
    try:
        return hasattr(config, SIZE)
    except RuntimeError:
        return False


def _compute_logits(
    model: PreTrainedModel,
    attributes: Attributes,
    patch: Mapping[str, Any],
    masked: Sequence[str],
    probe: Mapping[str, Any] | None,
) -> torch.Tensor:
    """Compute logits under a patched config, some blocks under a band of `_TRIED` tokens."""
    inputs = {**(probe or make_probe_inputs(model)), "use_cache": False}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(_add_band, with_kwargs=True)
        for path in masked
    ]
    try:
        with patching_config(model.config, patch), setting_attributes(model, attributes):
            return model(**inputs).logits.double()
    finally:
        for handle in handles:
            handle.remove()


def _add_band(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor):
        raise PlanError(f"{type(module).__name__} is given no mask to compare with")
    rows, columns = mask.shape[-2:]
    places = torch.arange(columns, device=mask.device)
    outside = places[None, :] <= places[:rows, None] - _TRIED
    lowest = torch.finfo(mask.dtype).min
    return args, {**kwargs, "attention_mask": mask.masked_fill(outside, lowest)}
