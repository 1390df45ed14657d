"""Probes: does a head look where a relation points? Accuracy against the best fixed offset.

After Clark et al. 2019 (arXiv:1906.04341, section 4). The attention of a word is the mean over its
tokens; the attention to a word is the sum over its tokens. A head is right if, of all other words,
it attends most to the one that the relation points to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from surgery.lab.analysis.spans import ProbeText
from surgery.lab.analysis.watch import compute_pattern, run_passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall

# Query rows that are in memory at once, in one layer.
ROWS = 256
# Relations with fewer pairs than this in one of the halves are skipped.
FEWEST = 20
REVERSED = " (reversed)"


@dataclass(frozen=True)
class ProbeResult:
    """The result for one relation in one direction.

    The texts are divided into two halves, in turns. The best head and the best offset are chosen
    on the first half and judged on the second, so that the best of many does not profit from luck.

    Attributes:
        source: name of the texts.
        pairs, judged: number of pairs in both halves, and in the second.
        accuracy: (layer, head) → accuracy on the second half.
        margin: (layer, head) → accuracy above the offset that was best on the other half; the
            lower value of the two halves.
        best: the best head of the first half.
        offset: the best offset of the first half, in words.
        offset_accuracy: accuracy of this offset on the second half.
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


def compute_word_attention(
    rows: torch.Tensor, row_words: torch.Tensor, key_words: torch.Tensor, words: int
) -> torch.Tensor:
    """Compute attention from words to words [H, words, words]: means over rows, sums over keys.

    Args:
        rows: [H, R, S], attention of some tokens.
        row_words, key_words: [R] and [S], the word of each token; -1: none.
    """
    heads = len(rows)
    to_words = rows.new_zeros(heads, rows.shape[1], words + 1)
    to_words.index_add_(2, key_words % (words + 1), rows)  # -1 becomes the last, which is dropped
    from_words = rows.new_zeros(heads, words + 1, words)
    from_words.index_add_(1, row_words % (words + 1), to_words[..., :words])
    counts = torch.bincount(row_words % (words + 1), minlength=words + 1).clamp(min=1)
    return (from_words / counts[:, None])[:, :words]


def looks_ahead(model: PreTrainedModel, text: ProbeText, sites: Sequence[Site]) -> bool:
    """Whether tokens see later tokens."""
    answers: list[bool] = []

    def observe(_: Site, call: AttentionCall) -> None:
        if not answers:
            visible = compute_pattern(call, torch.tensor([0])).visible
            answers.append(bool(visible[..., 1:].any()))

    batch = {"input_ids": text.input_ids[None]}
    for _ in run_passes(model, [batch], sites, observe, "analysis, direction"):
        pass
    return answers[0]


def run_probes(
    model: PreTrainedModel, texts: Sequence[ProbeText], sites: Sequence[Site], source: str
) -> tuple[dict[str, ProbeResult], list[str]]:
    """Judge every relation of `texts`, from dependent to head and from head to dependent.

    Texts run one at a time, and only the rows of words with a relation are used. If tokens do not
    see later tokens, a pair counts only in the direction that looks back.

    Returns:
        Name → result, with ``name (reversed)`` for the other direction; and the names of the
        relations that have too few pairs.
    """
    texts = [text for text in texts if text.pairs]
    if not texts:
        return {}, []
    ahead = looks_ahead(model, texts[0], sites)
    halves: dict[str, tuple[_Half, _Half]] = {}
    pairs_of_text: dict[str, torch.Tensor] = {}
    turn = 0

    def observe(site: Site, call: AttentionCall) -> None:
        guess = _find_guesses(call, texts[turn].units, pairs_of_text)
        for name, pairs in pairs_of_text.items():
            hits = (guess[:, pairs[:, 0]] == pairs[:, 1]).sum(1)
            half = halves[name][turn % 2].hits
            half[site.layer] = half.get(site.layer, torch.zeros(site.q_heads)) + hits

    def start_text() -> None:
        pairs_of_text.clear()
        pairs_of_text.update(_select_directions(texts[turn], ahead))
        for name, pairs in pairs_of_text.items():
            half = halves.setdefault(name, (_Half(), _Half()))[turn % 2]
            half.offsets.update((pairs[:, 1] - pairs[:, 0]).tolist())

    start_text()
    batches = [{"input_ids": text.input_ids[None]} for text in texts]
    for _ in run_passes(model, batches, sites, observe, f"analysis, probes of {source}"):
        turn += 1
        if turn < len(texts):
            start_text()
    enough = {
        name: pair
        for name, pair in halves.items()
        if min(half.offsets.total() for half in pair) >= FEWEST
    }
    results = {name: _judge(pair, source) for name, pair in enough.items()}
    return results, sorted(set(halves) - set(enough))


def _select_directions(text: ProbeText, ahead: bool) -> dict[str, torch.Tensor]:
    selected = {}
    for name, pairs in text.pairs.items():
        for key, directed in ((name, pairs), (name + REVERSED, pairs.flip(1))):
            visible = directed if ahead else directed[directed[:, 1] < directed[:, 0]]
            if len(visible):
                selected[key] = visible
    return selected


def _find_guesses(
    call: AttentionCall, units: torch.Tensor, pairs_of_text: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Find the word that each word with a relation attends to most: [H, words]."""
    words = int(units.max()) + 1
    sources = torch.zeros(words + 1, dtype=torch.bool)  # the last entry is for "no word"
    for pairs in pairs_of_text.values():
        sources[pairs[:, 0]] = True
    rows = torch.nonzero(sources[units]).flatten()
    device = call.query.device
    total = torch.zeros(call.query.shape[1], words, words, device=device)
    sizes = torch.bincount(units[rows], minlength=words).clamp(min=1).to(device)
    for part in rows.split(ROWS):
        own = units[part].to(device)
        means = compute_word_attention(
            compute_pattern(call, part).keys[0], own, units.to(device), words
        )
        # These are means over this part only, and a word may lie in two parts.
        share = torch.bincount(own, minlength=words) / sizes
        total += means * share[:, None]
    total.diagonal(dim1=1, dim2=2).fill_(-1)
    return total.argmax(-1).cpu()


def _judge(halves: tuple[_Half, _Half], source: str) -> ProbeResult:
    accuracies = [_compute_accuracies(half) for half in halves]
    offsets = [half.offsets.most_common(1)[0][0] for half in halves]
    # Each offset is judged on the half that did not choose it.
    baselines = [halves[n].offsets[offsets[1 - n]] / halves[n].offsets.total() for n in range(2)]
    best = max(accuracies[0], key=lambda head: accuracies[0][head])
    return ProbeResult(
        source,
        sum(half.offsets.total() for half in halves),
        halves[1].offsets.total(),
        accuracies[1],
        {head: min(accuracies[n][head] - baselines[n] for n in range(2)) for head in accuracies[1]},
        best,
        offsets[0],
        baselines[1],
    )


def _compute_accuracies(half: _Half) -> dict[tuple[int, int], float]:
    count = half.offsets.total()
    return {
        (layer, head): float(hits) / count
        for layer, row in half.hits.items()
        for head, hits in enumerate(row.tolist())
    }
