"""Does a head look where a relation says? Accuracy per relation, against the best fixed offset.

After Clark et al. 2019 (arXiv:1906.04341, section 4). A word's attention is the mean over its
tokens, what it gives to another word the sum over that one's tokens. A head is right where, of all
words but the word itself, it attends most to the one that the relation names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from surgery.lab.analysis.pattern import pattern
from surgery.lab.analysis.spans import ProbeText
from surgery.lab.analysis.watch import passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall

# Query rows that lie in memory at once, in one layer.
ROWS = 256
# Relations with fewer pairs than this in either half are not judged.
FEWEST = 20
REVERSED = " (reversed)"


@dataclass(frozen=True)
class Judged:
    """One relation in one direction.

    The texts fall into two halves, by turns. The best head and the best offset are chosen on the
    first and judged on the second, so that the best of many is not flattered.

    Attributes:
        source: what the texts are.
        pairs, judged: of both halves, of the second.
        accuracy: (layer, head) → accuracy on the second half.
        margin: (layer, head) → accuracy above the offset that was best on the other half; the
            lower of the two halves.
        best: the head, by the first half.
        offset: in words, by the first half.
        offset_accuracy: on the second half.
    """

    source: str
    pairs: int
    judged: int
    accuracy: Mapping[tuple[int, int], float]
    margin: Mapping[tuple[int, int], float]
    best: tuple[int, int]
    offset: int
    offset_accuracy: float


@dataclass
class _Half:
    hits: dict[int, torch.Tensor] = field(default_factory=dict)  # layer → [H]
    offsets: Counter[int] = field(default_factory=Counter)


def word_attention(
    rows: torch.Tensor, row_words: torch.Tensor, key_words: torch.Tensor, words: int
) -> torch.Tensor:
    """Attention from words to words, [H, words, words]: means over rows of sums over keys.

    Args:
        rows: [H, R, S], attention of some tokens.
        row_words, key_words: [R] and [S], the word of each; -1: none.
    """
    heads = len(rows)
    to_words = rows.new_zeros(heads, rows.shape[1], words + 1)
    to_words.index_add_(2, key_words % (words + 1), rows)  # -1 becomes the last, which is dropped
    found = rows.new_zeros(heads, words + 1, words)
    found.index_add_(1, row_words % (words + 1), to_words[..., :words])
    counts = torch.bincount(row_words % (words + 1), minlength=words + 1).clamp(min=1)
    return (found / counts[:, None])[:, :words]


def looks_ahead(model: PreTrainedModel, text: ProbeText, sites: Sequence[Site]) -> bool:
    """Whether tokens see later ones."""
    found: list[bool] = []

    def seen(_: Site, call: AttentionCall) -> None:
        if not found:
            found.append(bool(pattern(call, torch.tensor([0])).visible[..., 1:].any()))

    for _ in passes(model, [{"input_ids": text.input_ids[None]}], sites, seen, "analysis, a look"):
        pass
    return found[0]


def run_probes(
    model: PreTrainedModel, texts: Sequence[ProbeText], sites: Sequence[Site], source: str
) -> tuple[dict[str, Judged], list[str]]:
    """Judge every relation of `texts`, from dependent to head and the other way round.

    One text is looked at at a time, and of it only the rows of words that are asked about. Where
    tokens do not see later ones, a pair counts in the direction that looks back.

    Returns:
        By name, the other direction as ``name (reversed)``; and the names of those that have too
        few pairs to be judged.
    """
    texts = [text for text in texts if text.pairs]
    if not texts:
        return {}, []
    ahead = looks_ahead(model, texts[0], sites)
    halves: dict[str, tuple[_Half, _Half]] = {}
    asked: dict[str, torch.Tensor] = {}
    turn = 0

    def seen(site: Site, call: AttentionCall) -> None:
        guess = _guesses(call, texts[turn].units, asked)
        for name, pairs in asked.items():
            hits = (guess[:, pairs[:, 0]] == pairs[:, 1]).sum(1)
            half = halves[name][turn % 2].hits
            half[site.layer] = half.get(site.layer, torch.zeros(site.q_heads)) + hits

    def ask() -> None:
        asked.clear()
        asked.update(_directions(texts[turn], ahead))
        for name, pairs in asked.items():
            half = halves.setdefault(name, (_Half(), _Half()))[turn % 2]
            half.offsets.update((pairs[:, 1] - pairs[:, 0]).tolist())

    ask()
    batches = [{"input_ids": text.input_ids[None]} for text in texts]
    for _ in passes(model, batches, sites, seen, f"analysis, probes of {source}"):
        turn += 1
        if turn < len(texts):
            ask()
    enough = {
        name: pair
        for name, pair in halves.items()
        if min(half.offsets.total() for half in pair) >= FEWEST
    }
    judged = {name: _judged(pair, source) for name, pair in enough.items()}
    return judged, sorted(set(halves) - set(enough))


def _directions(text: ProbeText, ahead: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, pairs in text.pairs.items():
        for key, way in ((name, pairs), (name + REVERSED, pairs.flip(1))):
            seen = way if ahead else way[way[:, 1] < way[:, 0]]
            if len(seen):
                found[key] = seen
    return found


def _guesses(
    call: AttentionCall, units: torch.Tensor, asked: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """[H, words], the word that each asked-for word attends to most."""
    words = int(units.max()) + 1
    sources = torch.zeros(words + 1, dtype=torch.bool)  # the last is that of no word
    for pairs in asked.values():
        sources[pairs[:, 0]] = True
    rows = torch.nonzero(sources[units]).flatten()
    device = call.query.device
    total = torch.zeros(call.query.shape[1], words, words, device=device)
    sizes = torch.bincount(units[rows], minlength=words).clamp(min=1).to(device)
    for part in rows.split(ROWS):
        own = units[part].to(device)
        means = word_attention(pattern(call, part).keys[0], own, units.to(device), words)
        # Of these rows alone; a word may lie in two parts.
        share = torch.bincount(own, minlength=words) / sizes
        total += means * share[:, None]
    total.diagonal(dim1=1, dim2=2).fill_(-1)
    return total.argmax(-1).cpu()


def _judged(halves: tuple[_Half, _Half], source: str) -> Judged:
    accuracies = [_accuracies(half) for half in halves]
    offsets = [half.offsets.most_common(1)[0][0] for half in halves]
    # Each offset on the half that did not choose it.
    baselines = [halves[n].offsets[offsets[1 - n]] / halves[n].offsets.total() for n in range(2)]
    best = max(accuracies[0], key=lambda head: accuracies[0][head])
    return Judged(
        source,
        sum(half.offsets.total() for half in halves),
        halves[1].offsets.total(),
        accuracies[1],
        {head: min(accuracies[n][head] - baselines[n] for n in range(2)) for head in accuracies[1]},
        best,
        offsets[0],
        baselines[1],
    )


def _accuracies(half: _Half) -> dict[tuple[int, int], float]:
    count = half.offsets.total()
    return {
        (layer, head): float(hits) / count
        for layer, row in half.hits.items()
        for head, hits in enumerate(row.tolist())
    }
