"""Roles of heads that are known: built by hand, random, or seen in explicit maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery.errors import ConfigError, TapError
from surgery.lab.analysis.behaviour import observe_text
from surgery.lab.analysis.probes import run_probes
from surgery.lab.analysis.repeats import draw_repeats, observe_repeats
from surgery.lab.analysis.result import describe_heads
from surgery.lab.analysis.roles import ROLES, Thresholds, choose_role
from surgery.lab.analysis.spans import ProbeText
from surgery.lab.analysis.watch import find_self_attention
from tests.lab.analysis import handmade
from tests.tiny_models import FIELDS, tiny_model


def found(
    model: PreTrainedModel,
    vocabulary: torch.Tensor,
    text: torch.Tensor,
    probes: list[ProbeText] | None = None,
) -> dict[tuple[int, int], dict[str, Any]]:
    sites = find_self_attention(model)
    behaviour = observe_text(model, [{"input_ids": part} for part in text.split(4)], sites, None, 0)
    repeats = observe_repeats(model, draw_repeats(vocabulary, 8, 30, 4, 0), sites)
    judged = run_probes(model, probes, sites, "test")[0] if probes else {}
    heads = describe_heads(sites, behaviour, repeats, judged, Thresholds())
    return {(head["layer"], head["head"]): head for head in heads}


def sentences(count: int = 120) -> list[ProbeText]:
    """Ordinary tokens, and somewhere a dependent, somewhere before it its head."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for ids in handmade.text(count, 20, seed=1):
        head, dependent = torch.randperm(20, generator=generator)[:2].sort().values.tolist()
        kind = torch.randint(4, (2,), generator=generator).tolist()
        ids[head] = handmade.HEAD_WORDS[kind[0]]
        ids[dependent] = handmade.DEPENDENTS[kind[1]]
        pairs = {"seeks": torch.tensor([[dependent, head]])}
        made.append(ProbeText(ids, torch.arange(20), pairs))
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_built_for_a_role_are_named_by_it(attention: str) -> None:
    ordinary = torch.arange(handmade.FIRST, handmade.LAST)
    heads = found(handmade.gpt2(attention), ordinary, handmade.text(), sentences())
    assert {head: entry["role"] for head, entry in heads.items()} == handmade.ROLES
    for head, offset in handmade.OFFSETS.items():
        assert heads[head]["offset"] == offset
    assert heads[1, 1]["relation"] == "seeks"
    assert heads[1, 1]["probes"]["seeks"] == 1.0
    for head, entry in heads.items():  # what was built is there nearly whole
        role = handmade.ROLES[head]
        if role not in ("mixed", "syntactic"):
            assert entry["scores"][role] > 0.97


def test_heads_turned_by_rope_are_named_and_share_a_kv_head() -> None:
    heads = found(handmade.rotary(), torch.arange(handmade.FIRST, handmade.LAST), handmade.text())
    assert heads[0, 0]["role"] == "previous_token"
    assert heads[0, 1]["role"] == "positional"
    assert heads[0, 1]["offset"] == -2
    assert [heads[0, n]["kv_head"] for n in range(2)] == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fresh_heads_are_near_uniform_and_loud_random_ones_have_no_role(name: str) -> None:
    """Nothing else: what a random head does by chance is named by no score."""
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FIELDS[name]))
    vocabulary, text = torch.arange(3, 64), torch.randint(3, 64, (8, 60))
    roles = {entry["role"] for entry in found(fresh.eval(), vocabulary, text).values()}
    assert roles == {"broadcast"}
    for seed in range(3):
        loud = found(tiny_model(name, seed=seed), vocabulary, text)
        assert {entry["role"] for entry in loud.values()} == {"mixed"}


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "gpt_oss"])
def test_scores_are_those_of_the_explicit_map(name: str) -> None:
    """GQA, a sliding window, both directions with padding, and sinks; every row, loop by loop."""
    model = tiny_model(name, attention="eager").eval()
    text = torch.randint(3, 64, (3, 14))
    real = torch.ones_like(text)
    if name == "bert":
        real[1, 9:] = 0
    batch = {"input_ids": text, "attention_mask": real}
    sites = find_self_attention(model)
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    seen = observe_text(model, [batch], sites, None, 0)
    for site, p in zip(sites, maps, strict=True):
        found = seen[site.path]
        means, shares, offsets = found.statistics, found.shares, found.offsets
        for head in range(site.q_heads):
            rows = [
                (p[b, head, i], i)
                for b in range(3)
                for i in range(14)
                if real[b, i] and (p[b, :, i] > 0).any(0).sum() > 1
            ]
            before = [float(row[i - 1]) for row, i in rows if i > 0 and row[i - 1] > 0]
            assert means["previous_token"][head] == pytest.approx(mean(before), abs=1e-5)
            # Beside a sink even a single key is a choice.
            chosen = [(p[b, head, 0], 0) for b in range(3)] if name == "gpt_oss" else []
            first = [float(row[0]) for row, i in (*chosen, *rows) if row[0] > 0]
            assert means["first_token"][head] == pytest.approx(mean(first), abs=1e-5)
            if name != "gpt_oss":  # whose rows go to the sink as well
                # Of all real rows, those too that see a single key.
                all_rows = [p[b, head, i] for b in range(3) for i in range(14) if real[b, i]]
                entropy = [-float(torch.special.xlogy(row, row).sum()) for row in all_rows]
                assert means["attention_entropy"][head] == pytest.approx(mean(entropy), abs=1e-4)
            far = offsets[head]
            right = [
                int(row.argmax()) - i == far
                for row, i in rows
                if 0 <= i + far < 14 and row[i + far] > 0
            ]
            assert shares[head] == pytest.approx(mean(right), abs=1e-6)


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("number", range(len(ROLES)))
def test_the_first_role_that_passes_is_the_name(number: int) -> None:
    """In the documented order, at the threshold itself, and unmeasured scores pass nothing."""
    limits = Thresholds()
    scores = {role: getattr(limits, role) for role in ROLES[number:]}
    assert choose_role(scores, limits) == ROLES[number]
    below = {role: score - 1e-6 for role, score in scores.items()}
    assert choose_role({**below, **dict.fromkeys(ROLES[:number])}, limits) == "mixed"


def test_repeats_hold_no_token_twice_and_no_other_token() -> None:
    vocabulary = torch.tensor([3, 4, 9, 9, 12, 30])
    made = draw_repeats(vocabulary, 5, 50, 2, 0, ((1,), (2,)))
    assert (made.before, made.length) == (1, 5)
    assert [len(batch["input_ids"]) for batch in made.batches] == [2, 2, 1]
    for batch in made.batches:
        for ids in batch["input_ids"].tolist():
            assert ids[0] == 1
            assert ids[-1] == 2
            assert ids[1:6] == ids[6:11]
            assert sorted(ids[1:6]) == [3, 4, 9, 12, 30]
    assert len({tuple(ids) for batch in made.batches for ids in batch["input_ids"].tolist()}) > 1


def test_what_cannot_be_seen_is_refused() -> None:
    bloom = tiny_model("bloom", attention="eager")
    text = [{"input_ids": torch.randint(3, 64, (2, 8))}]
    with pytest.raises(TapError, match="cannot be observed"):
        observe_text(bloom, text, find_self_attention(bloom), None, 0)
    with pytest.raises(ConfigError, match="one stack"):
        find_self_attention(tiny_model("t5"))
    with pytest.raises(ConfigError, match="only one head"):
        find_self_attention(tiny_model("gpt2", n_layer=1, n_head=1))
