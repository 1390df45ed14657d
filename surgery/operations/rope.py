"""`rope`: other rotary positions, for a longer context or for none (arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from surgery.anatomy import Site
from surgery.architecture.rope_check import (
    ROTARY_FIRST,
    check_everywhere,
    check_nope,
    check_sites,
    site_layer_type,
)
from surgery.architecture.rotary import config_at, nested_types
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.layers import chosen
from surgery.operations.rope_lengths import MAX, ORIGINAL, new_maximum, original_length
from surgery.operations.rope_types import (
    HOLDS_ORIGINAL,
    RopeType,
    check_options,
    rope_parameters,
)
from surgery.plan.operation import Draft, Operation, Step

# Types for which transformers reads `head_dim` without deriving it where it is null.
_STRICT = (RopeType.dynamic, RopeType.yarn, RopeType.longrope)


@operation("rope")
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

    type: RopeType = RopeType.default
    theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    layer_type: str | None = None
    layers: list[int] | None = None

    def plan(self, draft: Draft) -> None:
        check_options(self.type, self._given(), f"attention.{self.name}")
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        if self.layers is not None and self.layer_type is not None:
            raise ConfigError(
                self.key("layer_type"),
                "layers already says which",
                given=self.layer_type,
                valid="null, or layers null",
            )
        for prefix in sorted({site.config_prefix for site in sites}):
            mine = [site for site in sites if site.config_prefix == prefix]
            self._one_config(draft, prefix, mine, whole=self._all(draft, prefix, mine))

    def _all(self, draft: Draft, prefix: str, sites: Sequence[Site]) -> bool:
        kept = [site for site in draft.sites if site.path not in draft.removed]
        return len(sites) == sum(site.config_prefix == prefix for site in kept)

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if value is not None and name not in ("type", "layers", "layer_type")
        }

    def _one_config(self, draft: Draft, prefix: str, sites: Sequence[Site], *, whole: bool) -> None:
        config = config_at(draft.config, prefix)
        if not getattr(config, "rope_parameters", None) or getattr(config, "alibi", False):
            raise ConfigError(
                f"attention.{self.name}",
                f"{config.model_type} models have no rotary embedding that reads rope_parameters; "
                "this operation changes positions of a model that has one",
                given=config.model_type,
                valid=ROTARY_FIRST,
            )
        if not whole:
            self._apart(draft, prefix, sites)
            return
        patch = self._patch(config, prefix)
        if not patch:
            draft.notes.append(f"{self.name}: the model has these positions already")
        elif self.type is RopeType.none:
            attributes = check_nope(draft.skeleton, draft.config, prefix, patch, sites)
            if attributes is not None:
                self._rebuild(draft, prefix, patch, attributes)
            elif self.layer_type is None:
                self._apart(draft, prefix, sites)
            else:
                raise ConfigError(
                    self.key("layer_type"),
                    f"a {config.model_type} config cannot say type none",
                    given=self.layer_type,
                    valid="null, and layers by number",
                )
        else:
            attributes = check_everywhere(draft.skeleton, draft.config, prefix, patch, sites)
            self._rebuild(draft, prefix, patch, attributes)

    def _rebuild(
        self, draft: Draft, prefix: str, patch: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> None:
        for key, value in patch.items():
            draft.set_config(key, value)
        arguments: dict[str, Any] = {"prefix": prefix} if prefix else {}
        if attributes:
            arguments["attributes"] = dict(attributes)
        draft.steps.append(Step(self.name, "rebuild_rotary", arguments))

    def _patch(self, config: Any, prefix: str) -> dict[str, Any]:
        """Dotted config keys of a whole model that change, and their values."""
        before = config.rope_parameters
        nested = nested_types(config)
        if nested:
            parameters: dict[str, Any] = dict(before)
            changed = self._chosen_types(before, nested)
            for kind in changed:
                parameters[kind] = self._parameters(config, before[kind], where=kind)
            first = before[changed[0]]
        else:
            if self.layer_type is not None:
                raise ConfigError(
                    self.key("layer_type"),
                    "all layers of this model share their positions",
                    given=self.layer_type,
                    valid="null",
                )
            parameters, first = self._parameters(config, before), before
        patch: dict[str, Any] = {"rope_parameters": parameters}
        original = self._original(config, first)
        maximum = getattr(config, MAX, None)
        patch[MAX] = new_maximum(
            self.type,
            self._given(),
            original,
            maximum,
            first.get(ORIGINAL) is not None,
            f"attention.{self.name}",
        )
        if self.type in HOLDS_ORIGINAL and getattr(config, ORIGINAL, None) is not None:
            patch[ORIGINAL] = original  # where a config has it, it overrides the one held
        if self.type in _STRICT and getattr(config, "head_dim", 0) is None:
            patch["head_dim"] = _head_dim(config)  # their formulas do not derive it
        return {
            f"{prefix}{name}": value
            for name, value in patch.items()
            if value != getattr(config, name, None)
        }

    def _chosen_types(self, before: Mapping[str, Any], nested: Sequence[str]) -> list[str]:
        rotating = [kind for kind in nested if before[kind] is not None]
        if self.layer_type is None:
            return rotating
        if self.layer_type not in rotating:
            raise ConfigError(
                self.key("layer_type"),
                "the model has no positions for such layers",
                given=self.layer_type,
                valid=rotating,
            )
        return [self.layer_type]

    def _parameters(
        self, config: Any, current: Mapping[str, Any], where: str | None = None
    ) -> dict[str, Any]:
        if where is not None and self.truncate is not None:
            raise ConfigError(
                self.key("truncate"),
                "transformers does not look for it where positions differ by layer type",
                given=self.truncate,
                valid="null",
            )
        original = None
        if self.type in HOLDS_ORIGINAL:
            original = self._original(config, current)
        if self.type is not RopeType.none:
            self._check_width(config, current)
        return rope_parameters(self.type, self._given(), current, original)

    def _check_width(self, config: Any, current: Mapping[str, Any]) -> None:
        """Rotated dimensions come in pairs, and LongRoPE has a number for each pair."""
        head_dim = _head_dim(config)
        share = self.partial_rotary_factor
        if share is None:
            share = 1.0
            if current.get("rope_type") != RopeType.proportional.value:
                share = current.get("partial_rotary_factor", 1.0)
        width = head_dim if self.type is RopeType.proportional else int(head_dim * share)
        if width % 2 or (self.type is RopeType.proportional and int(share * head_dim // 2) == 0):
            raise ConfigError(
                self.key("partial_rotary_factor"),
                f"{int(head_dim * share)} of a head's {head_dim} dimensions would rotate",
                given=share,
                valid="what makes it an even number, 2 or more",
            )
        if self.type is RopeType.dynamic and width < 4:
            raise ConfigError(
                self.key("type"),
                f"dynamic cannot do with {width} rotated dimensions per head",
                given=self.type.value,
                valid="linear, yarn, llama3",
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != width // 2:
                raise ConfigError(
                    self.key(name),
                    "needs a number for each rotated pair of dimensions",
                    given=f"{len(factors)} numbers",
                    valid=f"{width // 2} numbers",
                )

    def _original(self, config: Any, current: Mapping[str, Any]) -> int | None:
        stated = self.original_max_position_embeddings
        return original_length(config, current, stated, f"attention.{self.name}")

    def _apart(self, draft: Draft, prefix: str, sites: Sequence[Site]) -> None:
        """Positions of single layers, which no config says."""
        config = config_at(draft.config, prefix)
        own: dict[str, Any] = {}
        for site in sites:
            own[site.path] = None
            if self.type is not RopeType.none:
                kind = site_layer_type(draft.skeleton, draft.config, prefix, site)
                current = config.rope_parameters if kind is None else config.rope_parameters[kind]
                own[site.path] = self._parameters(config, current, where=kind)
                self._check_lengths(config, current)
        check_sites(draft.skeleton, draft.config, sites, own)
        if self.max_position_embeddings is not None:
            draft.set_config(f"{prefix}{MAX}", self.max_position_embeddings)
        draft.steps.append(Step(self.name, "site_rope", {"sites": own}, recorded=True))

    def _check_lengths(self, config: Any, current: Mapping[str, Any]) -> None:
        """The config's maximum is the other layers' too, so here it only changes when stated."""
        original, maximum = self._original(config, current), getattr(config, MAX, None)
        key = f"attention.{self.name}"
        new_maximum(self.type, self._given(), original, maximum, False, key)
        if self.type is RopeType.dynamic and original != maximum:
            raise ConfigError(
                f"{key}.layers",
                f"type dynamic scales beyond {MAX}, which is no longer the original {original}",
                given=self.layers,
                valid="null for all",
            )


def _head_dim(config: Any) -> int:
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
