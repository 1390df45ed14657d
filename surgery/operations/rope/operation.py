"""`rope`: other rotary positions, for a longer context or for none (arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

from transformers import PreTrainedModel

from surgery.config.hints import find_misfit
from surgery.config.options import POSITIVE, Range, get_range, option
from surgery.errors import ConfigError, PlanError
from surgery.models.config import get_config_part
from surgery.models.rotary import list_nested_types
from surgery.models.sites import Site, find_sites
from surgery.operations.rope.check import (
    can_say_nope,
    check_everywhere,
    check_sites,
    find_site_layer_type,
    make_no_rotary_error,
)
from surgery.operations.rope.frequencies import get_head_dim
from surgery.operations.rope.kinds import (
    HOLDS_ORIGINAL,
    NAMES,
    RopeType,
    check_type_options,
    make_rope_parameters,
)
from surgery.operations.rope.lengths import MAX, ORIGINAL, choose_maximum, find_original_length
from surgery.operations.rope.site_rope import has_site_rope, set_site_rope_
from surgery.plan.draft import Draft
from surgery.plan.layers import LAYERS_HELP, select_sites
from surgery.plan.operation import Operation, StepFunction

# Types for which transformers reads `head_dim` without deriving it where it is null.
_STRICT = (RopeType.dynamic, RopeType.yarn, RopeType.longrope)


def _set_checked_site_rope_(
    model: PreTrainedModel, sites: Mapping[str, Mapping[str, Any] | None]
) -> None:
    """Do the step, which may come from somebody else's record, after a check of its numbers.

    Raises:
        PlanError: a parameter has another type or range than the option of its name.
    """
    paths = {site.path for site in find_sites(model).sites}
    hints = get_type_hints(Rope)
    for path, parameters in sites.items():
        if path not in paths:
            raise PlanError(f"the model has no attention block {path}")
        for field in fields(Rope):
            name = NAMES.get(field.name, field.name)
            if field.name == "type" or not parameters or name not in parameters:
                continue
            value, bounds = parameters[name], get_range(field)
            misfit = find_misfit(value, hints[field.name], f"{path}.{name}")
            if misfit is not None:
                raise PlanError(misfit)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if bounds is not None and any(n not in bounds for n in numbers if n is not None):
                raise PlanError(f"{path}.{name}: must be {bounds}, not {value}")
    set_site_rope_(model, sites)


@dataclass
class Rope(Operation):
    """Options of `attention.rope`. ``None`` leaves to the type, or to the model, what it is.

    Attributes:
        type: how positions become angles.
        theta: base of the frequencies; ``None`` keeps the model's.
        partial_rotary_factor: share of a head's dimensions that rotate, in (0, 1].
        factor: how much longer the context becomes.
        attention_factor: factor on cos and sin, so its square is on the logits.
        beta_fast, beta_slow: YaRN: rotations over the original length above which a pair is kept,
            and below which it is divided by factor; 32 and 1.
        mscale, mscale_all_dim: YaRN: attention_factor as DeepSeek computes it.
        truncate: YaRN: whether those bounds are rounded to whole pairs.
        short_factor, long_factor: LongRoPE: a divisor per rotated pair.
        low_freq_factor, high_freq_factor: Llama 3: wavelengths over original length / this are
            divided, those under it are kept; 1 and 4.
        max_position_embeddings: positions the result is for; for scaling types factor times the
            original, for `dynamic` always the original.
        original_max_position_embeddings: positions the model was trained for before any scaling;
            ``None`` takes what its config holds.
        layer_type: where the config has parameters per layer type, the one to change; ``None``
            for all.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    name = "rope"
    steps: ClassVar[Mapping[str, StepFunction]] = {"site_rope": _set_checked_site_rope_}

    type: RopeType = option(RopeType.default)
    theta: float | None = option(
        None, "base of the frequencies; null keeps the model's", range=Range(1, low_open=True)
    )
    partial_rotary_factor: float | None = option(
        None,
        "share of a head that rotates; null keeps it",
        range=Range(0, 1, low_open=True),
        valid="above 0, at most 1 (for no rotation at all: type none)",
    )
    factor: float | None = option(
        None, "times longer the context becomes, at least 1", range=Range(1)
    )
    attention_factor: float | None = option(
        None, "yarn, longrope: on cos and sin; null: the papers'", range=POSITIVE
    )
    beta_fast: float | None = option(
        None, "yarn: pairs turning more often are kept; null: 32", range=POSITIVE
    )
    beta_slow: float | None = option(
        None, "yarn: pairs turning less often are divided; null: 1", range=POSITIVE
    )
    mscale: float | None = option(
        None, "yarn: attention_factor as DeepSeek computes it", range=POSITIVE
    )
    mscale_all_dim: float | None = option(None, "yarn: with mscale", range=POSITIVE)
    truncate: bool | None = option(None, "yarn: bounds rounded to whole pairs; null: true")
    short_factor: list[float] | None = option(
        None, "longrope: a divisor per pair, up to the original length", range=POSITIVE
    )
    long_factor: list[float] | None = option(None, "longrope: the same beyond it", range=POSITIVE)
    low_freq_factor: float | None = option(
        None, "llama3: waves longer than original / this; null: 1", range=POSITIVE
    )
    high_freq_factor: float | None = option(
        None, "llama3: waves shorter than original / this; null: 4", range=POSITIVE
    )
    max_position_embeddings: int | None = option(
        None, "null: factor times the original (dynamic: the original)", range=POSITIVE
    )
    original_max_position_embeddings: int | None = option(
        None, "trained for so many; null: as its config says", range=POSITIVE
    )
    layer_type: str | None = option(None, "where each layer type has its own; null for all")
    layers: list[int] | None = option(None, LAYERS_HELP)

    def check_options(self) -> None:
        check_type_options(self.type, self._list_given(), f"attention.{self.name}")
        if self.layers is not None and self.layer_type is not None:
            raise ConfigError(
                self.get_key("layer_type"),
                "has no effect where `layers` names the layers",
                given=self.layer_type,
                valid="null, or layers null",
            )

    def plan(self, draft: Draft) -> None:
        sites = select_sites(draft.sites, self.layers, self.get_key("layers"), draft.removed)
        for prefix in sorted({site.config_prefix for site in sites}):
            config_sites = [site for site in sites if site.config_prefix == prefix]
            self._plan_config(
                draft, prefix, config_sites, whole=self._covers_all(draft, prefix, config_sites)
            )

    def _covers_all(self, draft: Draft, prefix: str, sites: Sequence[Site]) -> bool:
        kept = [site for site in draft.sites if site.path not in draft.removed]
        return len(sites) == sum(site.config_prefix == prefix for site in kept)

    def _list_given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if value is not None and name not in ("type", "layers", "layer_type")
        }

    def _plan_config(
        self, draft: Draft, prefix: str, sites: Sequence[Site], *, whole: bool
    ) -> None:
        config = get_config_part(draft.config, prefix)
        if not getattr(config, "rope_parameters", None) or getattr(config, "alibi", False):
            raise make_no_rotary_error(config)
        if not whole:
            self._plan_sites(draft, prefix, sites)
            return
        patch = self._make_patch(config, prefix)
        if not patch:
            draft.notes.append(f"{self.name}: the model has these positions already")
            return
        if self.type is RopeType.none and not can_say_nope(draft, prefix, patch, sites):
            if self.layer_type is not None:
                raise ConfigError(
                    self.get_key("layer_type"),
                    f"a {config.model_type} config cannot say type none",
                    given=self.layer_type,
                    valid="null, and layers by number",
                )
            self._plan_sites(draft, prefix, sites)
            return
        if self.type is not RopeType.none:
            check_everywhere(draft, prefix, patch, sites)
        self._refuse_own(draft, sites)
        for key, value in patch.items():
            draft.set_config(key, value)
        if self.layer_type is None:
            for site in sites:
                draft.set_cell(
                    site.path, "positions", self._format_kind(self.type.value, self.factor)
                )

    @classmethod
    def verify(cls, model: PreTrainedModel, plan: Any, probe: Mapping[str, Any] | None) -> None:
        patch = plan.config_patch
        changed = [s for s in plan.before if f"{s.config_prefix}rope_parameters" in patch]
        own = _find_own_positions(model, changed)
        if own:
            raise PlanError(own)

    def _refuse_own(self, draft: Draft, sites: Sequence[Site]) -> None:
        own = _find_own_positions(draft.model, sites)
        if own:
            raise ConfigError(
                f"attention.{self.name}",
                own,
                given=self.type.value,
                valid="layers by number, which replaces them",
            )

    @staticmethod
    def _format_kind(kind: str | None, factor: float | None) -> str:
        if kind is None or kind == "none":
            return "none"
        return kind if factor is None else f"{kind} \N{MULTIPLICATION SIGN}{factor:g}"

    def _make_patch(self, config: Any, prefix: str) -> dict[str, Any]:
        """Make the dotted config keys of a whole model that change, and their values."""
        before = config.rope_parameters
        nested = list_nested_types(config)
        if nested:
            parameters: dict[str, Any] = dict(before)
            changed = self._choose_types(before, nested)
            for kind in changed:
                parameters[kind] = self._make_parameters(config, before[kind], where=kind)
            first = before[changed[0]]
        else:
            if self.layer_type is not None:
                raise ConfigError(
                    self.get_key("layer_type"),
                    "all layers of this model share their positions",
                    given=self.layer_type,
                    valid="null",
                )
            parameters, first = self._make_parameters(config, before), before
        patch: dict[str, Any] = {"rope_parameters": parameters}
        original = self._find_original(config, first)
        maximum = getattr(config, MAX, None)
        patch[MAX] = choose_maximum(
            self.type,
            self._list_given(),
            original,
            maximum,
            first.get(ORIGINAL) is not None,
            f"attention.{self.name}",
        )
        if self.type in HOLDS_ORIGINAL and getattr(config, ORIGINAL, None) is not None:
            patch[ORIGINAL] = original  # where a config has it, it overrides the one held
        if self.type in _STRICT and getattr(config, "head_dim", 0) is None:
            patch["head_dim"] = get_head_dim(config)  # their formulas do not derive it
        return {
            f"{prefix}{name}": value
            for name, value in patch.items()
            if value != getattr(config, name, None)
        }

    def _choose_types(self, before: Mapping[str, Any], nested: Sequence[str]) -> list[str]:
        rotating = [kind for kind in nested if before[kind] is not None]
        if self.layer_type is None:
            return rotating
        if self.layer_type not in rotating:
            raise ConfigError(
                self.get_key("layer_type"),
                "the model has no positions for such layers",
                given=self.layer_type,
                valid=rotating,
            )
        return [self.layer_type]

    def _make_parameters(
        self, config: Any, current: Mapping[str, Any], where: str | None = None
    ) -> dict[str, Any]:
        if where is not None and self.truncate is not None:
            raise ConfigError(
                self.get_key("truncate"),
                "transformers does not look for it where positions differ by layer type",
                given=self.truncate,
                valid="null",
            )
        original = None
        if self.type in HOLDS_ORIGINAL:
            original = self._find_original(config, current)
        if self.type is not RopeType.none:
            self._check_width(config, current)
        return make_rope_parameters(self.type, self._list_given(), current, original)

    def _check_width(self, config: Any, current: Mapping[str, Any]) -> None:
        """Check that rotated dimensions come in pairs, with a LongRoPE number for each pair."""
        head_dim = get_head_dim(config)
        share = self.partial_rotary_factor
        if share is None:
            share = 1.0
            if current.get("rope_type") != RopeType.proportional.value:
                share = current.get("partial_rotary_factor", 1.0)
        width = head_dim if self.type is RopeType.proportional else int(head_dim * share)
        if width % 2 or (self.type is RopeType.proportional and int(share * head_dim // 2) == 0):
            raise ConfigError(
                self.get_key("partial_rotary_factor"),
                f"{int(head_dim * share)} of a head's {head_dim} dimensions would rotate",
                given=share,
                valid="what makes it an even number, 2 or more",
            )
        if self.type is RopeType.dynamic and width < 4:
            raise ConfigError(
                self.get_key("type"),
                f"dynamic needs more than {width} rotated dimensions per head",
                given=self.type.value,
                valid="linear, yarn, llama3",
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != width // 2:
                raise ConfigError(
                    self.get_key(name),
                    "needs a number for each rotated pair of dimensions",
                    given=f"{len(factors)} numbers",
                    valid=f"{width // 2} numbers",
                )

    def _find_original(self, config: Any, current: Mapping[str, Any]) -> int | None:
        stated = self.original_max_position_embeddings
        return find_original_length(config, current, stated, f"attention.{self.name}")

    def _plan_sites(self, draft: Draft, prefix: str, sites: Sequence[Site]) -> None:
        """Plan positions of single layers, which no config says."""
        config = get_config_part(draft.config, prefix)
        own: dict[str, Any] = {}
        for site in sites:
            own[site.path] = None
            if self.type is not RopeType.none:
                kind = find_site_layer_type(draft, prefix, site)
                current = config.rope_parameters if kind is None else config.rope_parameters[kind]
                own[site.path] = self._make_parameters(config, current, where=kind)
                self._check_lengths(config, current)
        check_sites(draft, sites, own)
        if self.max_position_embeddings is not None:
            draft.set_config(f"{prefix}{MAX}", self.max_position_embeddings)
        draft.add_step("site_rope", {"sites": own}, recorded=True)
        for path, parameters in own.items():
            held = parameters or {}
            draft.set_cell(
                path, "positions", self._format_kind(held.get("rope_type"), held.get("factor"))
            )

    def _check_lengths(self, config: Any, current: Mapping[str, Any]) -> None:
        """Check lengths; the config's maximum is for all layers, so it changes only when stated."""
        original, maximum = self._find_original(config, current), getattr(config, MAX, None)
        key = f"attention.{self.name}"
        choose_maximum(self.type, self._list_given(), original, maximum, False, key)
        if self.type is RopeType.dynamic and original != maximum:
            raise ConfigError(
                f"{key}.layers",
                f"type dynamic scales beyond {MAX}, which is no longer the original {original}",
                given=self.layers,
                valid="null for all",
            )


def _find_own_positions(model: PreTrainedModel, sites: Sequence[Site]) -> str:
    """Find why the positions of all `sites` cannot be changed at once; "" if they can."""
    own = [site.path for site in sites if has_site_rope(model.get_submodule(site.path))]
    if not own:
        return ""
    return (
        f"{', '.join(own)}: these blocks have positions of their own, which this would not change"
    )
