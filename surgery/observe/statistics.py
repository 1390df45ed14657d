"""What each head does with its queries: statistics of attention rows, exact on the rows drawn.

Memory is linear in the number of keys: rows are looked at in blocks, and a block's probabilities
are forgotten before the next. Rows of padding never count. A row that sees a single key has no
choice: it counts for `attention_entropy`, `max_logit` and `output_norm` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from surgery.observe.masks import EVERY, visible_keys
from surgery.observe.rows import key_logits, row_weights, sink_logits
from surgery.observe.tap import AttentionCall
from surgery.observe.targets import COLUMNS, SETS, Targets, find_targets

# In the order of the table's columns. Means over rows, but for the two below.
STATISTICS = (
    "attention_entropy",  # H = lse - Σ p·s, nats
    "normalized_entropy",  # H / log(keys the row sees)
    "max_logit",  # the largest s of all rows
    "saturation",  # share of rows with one p above SATURATED
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
# Above it Σ p² > 0.98: diag(p) - pp^T, through which every gradient to the logits has to pass, has
# a trace 1 - Σ p² below 0.02.
SATURATED = 0.99

# A block of logits: few enough rows, and of few enough examples, for it to stay in a CPU's cache.
BLOCK_ROWS = 64
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_ELSEWHERE = 128 << 20
# The logit of a hidden key: e^(FLOOR - m) is 0, and 0 times it still a number, unlike -inf.
FLOOR = -1e30

Values = dict[str, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def head_statistics(
    call: AttentionCall, rows: torch.Tensor, names: Sequence[str] = STATISTICS
) -> Values:
    """Sums over query rows `rows` [R] of every example, fit for `HeadSums`.

    Args:
        names: of `STATISTICS`.

    Returns:
        name → (sum, or for `MAXIMA` the maximum, [Hq]; rows that counted [Hq]).
        `ROOTS` are sums of squares.

    Raises:
        TapError: a mask of a kind that is not known.
    """
    rows = rows.to(call.query.device)
    # Not a mask: to send one to a GPU would wait for it.
    maxima = [i for i, name in enumerate(names) if name in MAXIMA]
    totals: torch.Tensor | None = None
    for examples, block in _blocks(call, rows):
        found = row_statistics(call, block, names, examples)
        shape = torch.broadcast_shapes(*(value.shape for value, _ in found.values()))
        values = torch.stack([found[name][0].expand(shape) for name in names])
        counted = torch.stack([found[name][1].expand(shape) for name in names])
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


def _blocks(call: AttentionCall, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    batch, heads = call.query.shape[:2]
    budget = BLOCK_BYTES.get(rows.device.type, BLOCK_BYTES_ELSEWHERE)
    example = 4 * heads * min(len(rows), BLOCK_ROWS) * call.key.shape[2]
    step = max(1, budget // max(1, example))
    for start in range(0, batch, step):
        for block in rows.split(BLOCK_ROWS):
            yield slice(start, min(start + step, batch)), block


@torch.no_grad()
def row_statistics(
    call: AttentionCall,
    rows: torch.Tensor,
    names: Sequence[str] = STATISTICS,
    examples: slice = EVERY,
) -> Values:
    """The same, row by row: name → (value, whether the row counts) [1 or b, 1 or Hq, R] each."""
    real = row_weights(call, rows, examples)[:, None, :].bool()
    values: Values = {}
    if "output_norm" in names:
        output = call.output[examples].index_select(1, rows).float()
        values["output_norm"] = (output.square().sum(-1).transpose(1, 2), real)
    wanted = set(names) - values.keys()
    if wanted:
        visible = visible_keys(call, rows, examples)
        targets = find_targets(call, rows, visible, examples) if wanted & _AIMED else None
        values |= _of_logits(call, rows, examples, visible, real, targets)
    return values


_AIMED = {*COLUMNS, *SETS, "distance"}


def _of_logits(
    call: AttentionCall,
    rows: torch.Tensor,
    examples: slice,
    visible: torch.Tensor,
    real: torch.Tensor,
    targets: Targets | None,
) -> Values:
    # Few passes over the block, in place where they can be: they are what this costs.
    s = key_logits(call, rows, visible, examples, FLOOR)
    keys = visible.sum(-1)
    top = s.amax(-1)
    p = s.softmax(-1)
    confidence = p.amax(-1)
    masses = {} if targets is None else _masses(p, targets)
    # lse - top = -log(largest p), and so H = -log(largest p) - Σ p·(s - top).
    entropy = -confidence.log() - s.sub_(top[..., None]).mul_(p).sum(-1)
    largest, on_keys = confidence, None
    sink = sink_logits(call)
    if sink is not None:  # one more choice beside the keys, which keep on_keys of the attention
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
    for name in _AIMED:
        mass, there = masses.get(name, (torch.zeros_like(entropy), torch.zeros_like(seen)))
        # How far away the keys are that are attended to has nothing to do with the sink.
        share = mass if on_keys is None or name == "distance" else mass * on_keys
        values[name] = (share, several & (keys > 0) & there)
    return values


def _masses(p: torch.Tensor, targets: Targets) -> Values:
    """Σ p over each target, and whether it is there: [b, Hq, R] and what broadcasts to it."""
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
    # One product reads p once for all of them: per row, [sums, S] @ [S, Hq].
    with torch.autocast(p.device.type, enabled=False):
        sums = torch.stack(
            [torch.bmm(together[i], p[i].permute(1, 2, 0)) for i in range(len(p))]
        ).permute(2, 0, 3, 1)
    for name, mass, target in zip(targets.sets, sums, targets.sets.values(), strict=False):
        masses[name] = (mass, target.any(-1)[:, None])
    masses["distance"] = (sums[-1], torch.ones_like(sums[-1], dtype=torch.bool))
    return masses
