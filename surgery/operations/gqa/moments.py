"""What one site's data comes down to: bounded running sums, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from surgery.calibration.rows import widen
from surgery.calibration.view import SiteView
from surgery.errors import SiteError
from surgery.models.sites import Site
from surgery.observe.rows import compute_row_logits, sample_rows, weigh_rows
from surgery.operations.gqa.keys import KeyMoments
from surgery.operations.gqa.planes import Planes, find_planes
from surgery.operations.gqa.scales import Scales, make_unit_scales, measure_scales, normalise_heads

Groups = Sequence[Sequence[int]]
# How far numbers that should be equal may differ, in units of their dtype's rounding.
ROUNDING = 16


class SiteMoments:
    """Sums over the tokens of one site.

    For H KV heads of D features: H² complex numbers per rotated plane, (H * F)² for F unrotated
    features, (H * D)² for values; and, for the given groups, (members * D)² per query head.

    Args:
        model: the model the site is part of.
        groups: KV heads whose attended values are wanted side by side; none for keys and values
            alone.
        rows: query rows drawn per sequence for these.
        values: whether those of all heads are wanted, as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: Site,
        groups: Groups,
        rows: int,
        seed: int,
        *,
        values: bool = True,
    ) -> None:
        self.model, self.site, self.groups, self.rows = model, site, groups, rows
        self.with_values = values
        self.generator = torch.Generator().manual_seed(seed)
        self.layout: Planes | None = None
        self.key_scales: Scales | None = None
        self.query_scales: Scales | None = None
        self.tokens = 0.0
        self.queries = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._attended: dict[int, torch.Tensor] = {}
        self._drawn = 0.0

    @torch.no_grad()  # norms have parameters: a sum would keep the graph of every batch
    def add(self, view: SiteView) -> None:
        """Add what was seen of one batch.

        Raises:
            SiteError: the site does something to its heads that nothing here knows.
        """
        if view.query is None or view.key is None or view.value is None:
            raise self._make_refusal("its projections are not called as modules")
        query = normalise_heads(self.model, self.site.q_norm, view.query)
        key = normalise_heads(self.model, self.site.k_norm, view.key)
        if self.layout is None:
            self._inspect(view, query, key)
        self._add_keys(view, query, key)
        if self.with_values:
            self._add_values(view)
        if self.groups:
            self._add_attended(view)

    def get_key_moments(self) -> KeyMoments:
        """Get the second moments of keys and queries."""
        assert self.layout is not None
        total, sums = self.tokens, self._sums
        self._refuse_no_numbers()
        mean = sums["key_mean"] / total
        free = sums["free"] / total - torch.outer(mean, mean)
        return KeyMoments(
            layout=self.layout,
            planes=sums["planes"] / total,
            power=sums["power"] / self.queries,
            free=(free + free.mT) / 2,
            metric=sums["metric"] / self.queries,
        )

    def get_value_moments(self) -> torch.Tensor:
        """Get [H * D, H * D] second moments of the values of one token, head by head."""
        self._refuse_no_numbers()
        return self._sums["values"] / self.tokens

    def get_attended_moments(self) -> dict[int, torch.Tensor]:
        """Get query head → [members * D, members * D], the values it attends to in its group."""
        self._refuse_no_numbers()
        return {head: total / self._drawn for head, total in self._attended.items()}

    def _refuse_no_numbers(self) -> None:
        sums = [*self._sums.values(), *self._attended.values()]
        if not all(bool(total.isfinite().all()) for total in sums):
            raise self._make_refusal("its activations are not finite")
        if not self.tokens or not self.queries or (self._attended and not self._drawn):
            raise self._make_refusal("no token of the calibration data is real")

    def _inspect(self, view: SiteView, query: torch.Tensor, key: torch.Tensor) -> None:
        """Find what happens between projections and attention, from one batch."""
        call, site = view.call, self.site
        assert call is not None
        assert view.inputs is not None
        assert view.query is not None
        assert view.key is not None
        assert view.value is not None
        if call.key.shape != key.transpose(1, 2).shape:
            raise self._make_refusal("what it attends to is not its own keys, head by head")
        if key.shape[1] < 2:
            raise self._make_refusal("positions cannot be distinguished in sequences of one token")
        if not all(bool(x.isfinite().all()) for x in (query, key, view.value)):
            raise self._make_refusal("its activations are not finite")
        # Positions are computed in fp32 whatever the weights.
        rounding = ROUNDING * max(torch.finfo(key.dtype).eps, torch.finfo(torch.float32).eps)
        rows = key.transpose(1, 2).flatten(0, 2).float()
        self.layout = find_planes(rows, call.key.flatten(0, 2).float(), rounding)
        if self.layout is None:
            raise self._make_refusal(
                "its keys are changed before the attention in a way unknown here"
            )
        if not _is_near(view.value.transpose(1, 2), call.value, rounding):
            raise self._make_refusal("its values are changed before the attention")
        if not _is_near(call.output.flatten(2), view.inputs, rounding):
            raise self._make_refusal("what it attends to is changed before the output projection")
        self.key_scales = make_unit_scales(site, "key", widen(rows[:1]))
        self.query_scales = make_unit_scales(site, "query", widen(rows[:1]))
        if site.k_norm is not None:
            self.key_scales = measure_scales(view.key.flatten(0, 1), key.flatten(0, 1))
        if site.q_norm is not None:
            self.query_scales = measure_scales(view.query.flatten(0, 1), query.flatten(0, 1))

    def _make_refusal(self, why: str) -> SiteError:
        return SiteError(self.site.path, why)

    def _add_sum(self, name: str, added: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name] += added  # in place: those of values are [H * D, H * D]
        else:
            self._sums[name] = added

    def _add_keys(self, view: SiteView, query: torch.Tensor, key: torch.Tensor) -> None:
        assert self.layout is not None
        site, free = self.site, list(self.layout.free)
        # Products of the widest numbers: heads that can share exactly have singular moments, and
        # what rounding leaves in their null space is divided by almost nothing later.
        q, k = widen(query), widen(key)
        q = q.flatten(0, 1) if view.real is None else q[view.real]  # [T, heads, D]
        k = k.flatten(0, 1) if view.real_keys is None else k[view.real_keys]
        self.tokens += len(k)
        self.queries += len(q)
        grouped = q.unflatten(1, (site.kv_heads, -1))
        planes = self.layout.to_complex(k).permute(2, 1, 0)  # [P, H, T]
        self._add_sum("planes", planes @ planes.mH)
        power = self.layout.to_complex(grouped).abs().pow(2).sum((0, 2))
        self._add_sum("power", power.mT)
        rest = k[..., free].flatten(1)
        self._add_sum("free", rest.mT @ rest)
        self._add_sum("key_mean", rest.sum(0))
        read = grouped[..., free].transpose(0, 1).flatten(1, 2)  # [H, T * group, F]
        self._add_sum("metric", read.mT @ read)

    def _add_values(self, view: SiteView) -> None:
        assert view.value is not None
        v = widen(view.value)
        v = v.flatten(0, 1) if view.real_keys is None else v[view.real_keys]
        v = v.flatten(1)
        self._add_sum("values", v.mT @ v)

    def _add_attended(self, view: SiteView) -> None:
        call, site = view.call, self.site
        assert call is not None
        rows = sample_rows(call.query.shape[2], self.rows, self.generator)
        weights = weigh_rows(call, rows)  # [B, R]
        shares = torch.softmax(compute_row_logits(call, rows), dim=-1).nan_to_num(0.0)
        shares = shares[..., : call.value.shape[2]] * weights[:, None, :, None]
        self._drawn += float(weights.sum())
        value = call.value if call.value.dtype == torch.float64 else call.value.float()
        shares = shares.to(value.dtype)
        size = site.group_size
        for group in self.groups:
            beside = torch.cat([value[:, head] for head in group], dim=-1)  # [B, S, members * D]
            for head in (h for member in group for h in range(member * size, (member + 1) * size)):
                seen = widen(shares[:, head] @ beside).flatten(0, 1)
                added = seen.mT @ seen
                if head in self._attended:
                    self._attended[head] += added
                else:
                    self._attended[head] = added


def _is_near(a: torch.Tensor, b: torch.Tensor, rounding: float) -> bool:
    if a.shape != b.shape:
        return False
    size = b.float().abs().max().clamp_min(1e-30)
    return bool(((a.float() - b.float()).abs() <= rounding * size).all())
