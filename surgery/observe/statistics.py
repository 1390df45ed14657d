"""Statistics of attention rows for each head, exact on the rows drawn.

Memory is linear in the number of keys: rows are handled in blocks, and the probabilities of a
block are freed before the next one. Rows of padding never count. A row that sees a single key has
no choice, so it counts only for `attention_entropy`, `max_logit` and `output_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from surgery.observe.masks import EVERY, find_visible_keys
from surgery.observe.rows import compute_key_logits, get_sink_logits, weigh_rows
from surgery.observe.tap import AttentionCall
from surgery.observe.targets import COLUMNS, SETS, Targets, find_targets

# In the order of the table's columns. All are means over rows, except the two sets below.
STATISTICS = (
    "attention_entropy",  # H = lse - Σ p·s, nats
    "normalized_entropy",  # H / log(keys the row sees)
    "max_logit",  # the largest s of all rows
    "saturation",  # fraction of rows with one p above SATURATED
    "confidence",  # the largest p (Voita et al. 2019, arXiv:1905.09418)
    "first_token",  # p of the text's first key
    "previous_token",  # p of the key before the query's own
    "own_token",  # p of the query's own key
    "same_token",  # p of earlier keys with the query's token
    "induction",  # p of keys that follow such a key (Olsson et al. 2022, arXiv:2209.11895)
    "distance",  # Σ p·|i - j| / Σ p, tokens
    "output_norm",  # root mean square over rows of ‖o_h‖
)
MAXIMA = frozenset({"max_logit"})
ROOTS = frozenset({"output_norm"})
# Above it, Σ p² > 0.98. Every gradient to the logits passes through diag(p) - pp^T, whose trace
# 1 - Σ p² is then below 0.02.
SATURATED = 0.99

# A block of logits has so few rows and examples that it stays in a CPU's cache.
BLOCK_ROWS = 64
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_ELSEWHERE = 128 << 20
# The logit of a hidden key. e^(FLOOR - m) is 0, and unlike with -inf, 0 · FLOOR is not NaN.
FLOOR = -1e30

Values = dict[str, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def compute_head_statistics(
    call: AttentionCall, rows: torch.Tensor, names: Sequence[str] = STATISTICS
) -> Values:
    """Sum statistics over query rows `rows` [R] of every example, in the form `HeadSums` takes.

    Args:
        names: which of `STATISTICS`.

    Returns:
        name → (sum, or for `MAXIMA` the maximum, [Hq]; number of rows that counted [Hq]).
        `ROOTS` are sums of squares.

    Raises:
        TapError: the type of the mask is unknown.
    """
    rows = rows.to(call.query.device)
    # A list and not a mask: sending a mask to a GPU would make the CPU wait.
    maxima = [i for i, name in enumerate(names) if name in MAXIMA]
    totals: torch.Tensor | None = None
    for examples, block in _split_blocks(call, rows):
        by_row = compute_row_statistics(call, block, names, examples)
        shape = torch.broadcast_shapes(*(value.shape for value, _ in by_row.values()))
        values = torch.stack([by_row[name][0].expand(shape) for name in names])
        counted = torch.stack([by_row[name][1].expand(shape) for name in names])
        sums = torch.where(counted, values, torch.zeros_like(values)).sum((1, 3))
        for i in maxima:
            lowest = torch.full_like(values[i], float("-inf"))
            sums[i] = torch.where(counted[i], values[i], lowest).amax((0, 2))
        # MPS has no float64.
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        both = torch.stack([sums.to(wide), counted.sum((1, 3)).to(wide)])
        if totals is not None:
            tops = [torch.maximum(totals[0, i], both[0, i]) for i in maxima]
            both += totals
            for i, top in zip(maxima, tops, strict=True):
                both[0, i] = top
        totals = both
    assert totals is not None
    return {name: (totals[0, i], totals[1, i]) for i, name in enumerate(names)}


def _split_blocks(call: AttentionCall, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    batch, heads = call.query.shape[:2]
    budget = BLOCK_BYTES.get(rows.device.type, BLOCK_BYTES_ELSEWHERE)
    example = 4 * heads * min(len(rows), BLOCK_ROWS) * call.key.shape[2]
    step = max(1, budget // max(1, example))
    for start in range(0, batch, step):
        for block in rows.split(BLOCK_ROWS):
            yield slice(start, min(start + step, batch)), block


@torch.no_grad()
def compute_row_statistics(
    call: AttentionCall,
    rows: torch.Tensor,
    names: Sequence[str] = STATISTICS,
    examples: slice = EVERY,
) -> Values:
    """Compute statistics row by row.

    Returns:
        name → (value, whether the row counts), each [1 or b, 1 or Hq, R].
    """
    real = weigh_rows(call, rows, examples)[:, None, :].bool()
    values: Values = {}
    if "output_norm" in names:
        output = call.output[examples].index_select(1, rows).float()
        values["output_norm"] = (output.square().sum(-1).transpose(1, 2), real)
    wanted = set(names) - values.keys()
    if wanted:
        visible = find_visible_keys(call, rows, examples)
        targets = find_targets(call, rows, visible, examples) if wanted & _WITH_TARGETS else None
        values |= _compute_logit_statistics(call, rows, examples, visible, real, targets)
    return values


_WITH_TARGETS = {*COLUMNS, *SETS, "distance"}


def _compute_logit_statistics(
    call: AttentionCall,
    rows: torch.Tensor,
    examples: slice,
    visible: torch.Tensor,
    real: torch.Tensor,
    targets: Targets | None,
) -> Values:
    # Passes over the block are the cost of this: few of them, and in place where possible.
    s = compute_key_logits(call, rows, visible, examples, FLOOR)
    keys = visible.sum(-1)
    top = s.amax(-1)
    p = s.softmax(-1)
    confidence = p.amax(-1)
    masses = {} if targets is None else _sum_masses(p, targets)
    # lse - top = -log(largest p), and so H = -log(largest p) - Σ p·(s - top).
    entropy = -confidence.log() - s.sub_(top[..., None]).mul_(p).sum(-1)
    largest, on_keys = confidence, None
    sink = get_sink_logits(call)
    if sink is not None:  # one more choice: the keys get the fraction `on_keys` of the attention
        log_keys = top - confidence.log() - sink.view(1, -1, 1)
        on_keys, spare = log_keys.sigmoid(), (-log_keys).sigmoid()
        entropy = on_keys * entropy + torch.special.entr(on_keys) + torch.special.entr(spare)
        confidence = confidence * on_keys
        largest = torch.maximum(confidence, spare)
    entropy = entropy.clamp_min(0)
    choices = keys if sink is None else keys + 1
    seen, several = real & (choices > 0), real & (choices > 1)
    values: Values = {
        "attention_entropy": (entropy, seen),
        "normalized_entropy": (entropy / choices.clamp_min(2).log(), several),
        "max_logit": (top, real & (keys > 0)),
        "saturation": ((largest > SATURATED).float(), several),
        "confidence": (confidence, several & (keys > 0)),
    }
    for name in _WITH_TARGETS:
        mass, there = masses.get(name, (torch.zeros_like(entropy), torch.zeros_like(seen)))
        # The distance to the attended keys does not depend on the sink.
        share = mass if on_keys is None or name == "distance" else mass * on_keys
        values[name] = (share, several & (keys > 0) & there)
    return values


def _sum_masses(p: torch.Tensor, targets: Targets) -> Values:
    """Sum p over each target: name → (sum [b, Hq, R], whether the row has such a target)."""
    shape = p.shape[:-1]
    index = [key.expand(shape) for key, _ in targets.columns.values()]
    picked = p.gather(-1, torch.stack(index, -1)).unbind(-1)
    masses = {
        name: (mass, there)
        for (name, (_, there)), mass in zip(targets.columns.items(), picked, strict=True)
    }
    if targets.distance is None:
        return masses
    weights = [weight.expand(len(p), -1, -1).to(p.dtype) for weight in targets.sets.values()]
    weights.append(targets.distance.expand(len(p), -1, -1).to(p.dtype))
    together = torch.stack(weights, dim=2)
    # One product reads p only once for all targets: per row, [sums, S] @ [S, Hq].
    with torch.autocast(p.device.type, enabled=False):
        sums = torch.stack(
            [torch.bmm(together[i], p[i].permute(1, 2, 0)) for i in range(len(p))]
        ).permute(2, 0, 3, 1)
    for name, mass, target in zip(targets.sets, sums, targets.sets.values(), strict=False):
        masses[name] = (mass, target.any(-1)[:, None])
    masses["distance"] = (sums[-1], torch.ones_like(sums[-1], dtype=torch.bool))
    return masses
