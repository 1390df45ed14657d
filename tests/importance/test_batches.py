"""Models of other tasks: their loss is the model's own, or one message says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from surgery import Calibration, apply_, make_calibrated_plan, parse_operations, score_heads
from surgery.errors import ConfigError
from tests.families import family, masked_lm, randomised, tokens

_BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 5,
}
_VIT = {"image_size": 16, "patch_size": 8, "num_labels": 5}
_SOUND = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}
_T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
CLASSES = torch.tensor([0, 4, 2])
IDS = tokens(3, 8)
MASKED = IDS.masked_fill(torch.arange(8) % 3 > 0, -100)


def make(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    return randomised(kind(config), 0, torch.float64)


def case(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    if name == "image":
        config = ViTConfig(**(_BERT | _VIT))
        pixels = torch.linspace(-3, 3, 3 * 3 * 256, dtype=torch.float64).view(3, 3, 16, 16).sin()
        return make(ViTForImageClassification, config), {"pixel_values": pixels, "labels": CLASSES}
    if name == "sound":
        config = Wav2Vec2Config(**(_BERT | _SOUND))
        wave = torch.linspace(-3, 3, 3 * 400, dtype=torch.float64).view(3, 400).sin()
        model = make(Wav2Vec2ForSequenceClassification, config)
        return model, {"input_values": wave, "labels": CLASSES}
    if name == "tokens":
        return make(BertForTokenClassification, BertConfig(**_BERT)), {
            "input_ids": IDS,
            "labels": (IDS % 5).masked_fill(MASKED < 0, -100),
        }
    if name == "translation":
        model = make(T5ForConditionalGeneration, T5Config(**_T5))
        return model, {"input_ids": IDS, "labels": IDS.flip(1)}
    if name == "masked":
        return masked_lm("bert", num_key_value_heads=8), {"input_ids": IDS, "labels": MASKED}
    return family("llama"), {"input_ids": IDS, "labels": MASKED}


CASES = ("image", "sound", "tokens", "translation", "masked", "next token")


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own(name: str) -> None:
    model, batch = case(name)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    for estimator in ("gate_gradient", "leave_one_out"):
        assert score_heads(model, [batch], estimator).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "attention",
    [
        {"prune_heads": {"amount": 0.5, "estimator": "gate_gradient"}},
        {"gqa": {"kv_heads": 2, "merge": "optimal"}},
    ],
)
def test_an_image_classifier_is_calibrated(attention: dict[str, Any]) -> None:
    model, batch = case("image")
    options = Calibration(refine_steps=2)
    plan = make_calibrated_plan(model, parse_operations(attention), [batch], options)
    heads = [site.q_heads if "prune_heads" in attention else site.kv_heads for site in plan.after]
    assert heads == [2, 2]
    assert apply_(model, plan)(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "key", "said"),
    [
        ("image", {"labels": CLASSES + 1}, "data", "labels do not fit the model's logits"),
        ("image", {"labels": CLASSES.double()}, "importance.estimator", "classes, not numbers"),
        ("image", {"labels": torch.ones(3, 5).long()}, "data", "do not fit"),
        ("image", {"pixel_values": [1]}, "data", "must hold only tensors"),
        ("image", {"pixel_values": torch.ones(3, 3, 9, 9)}, "data", "cannot run on this batch"),
        ("tokens", {"labels": CLASSES}, "data", "do not fit the model's logits"),
        ("next token", {"labels": IDS[:, None]}, "importance.estimator", "a label for each token"),
        ("next token", {"input_ids": IDS + 99}, "data", "cannot run on this batch: index out of"),
    ],
)
def test_batches_that_do_not_fit(name: str, change: dict[str, Any], key: str, said: str) -> None:
    model, batch = case(name)
    for estimator in ("gate_gradient", "leave_one_out"):
        with pytest.raises(ConfigError, match=said) as caught:
            score_heads(model, [batch | change], estimator)
        assert caught.value.key == key


@pytest.mark.parametrize("batch", [(IDS, IDS), [IDS], {}])
def test_a_batch_that_is_no_mapping(batch: Any) -> None:
    operations = parse_operations({"gqa": {"kv_heads": 2, "merge": "optimal"}})
    with pytest.raises(ConfigError, match="data: a batch must be a mapping"):
        make_calibrated_plan(family("llama"), operations, [batch])
    with pytest.raises(ConfigError, match="data: a batch must be a mapping"):
        score_heads(family("llama"), [batch], "output_norm")


def test_what_a_forward_lacks_is_said_by_calibration_too() -> None:
    operations = parse_operations({"gqa": {"kv_heads": 2, "merge": "optimal"}})
    with pytest.raises(ConfigError, match="data: LlamaForCausalLM cannot run on this batch") as no:
        make_calibrated_plan(
            family("llama"), operations, [{"attention_mask": torch.ones_like(IDS)}]
        )
    assert no.value.given == "attention_mask [3, 8]"


@pytest.mark.parametrize(
    ("kind", "labels", "said"),
    [
        (BertModel, IDS, "measures a loss, but BertModel gives no logits"),
        (BertForQuestionAnswering, IDS, "measures a loss, but BertForQuestionAnswering gives no"),
        (BertForSequenceClassification, torch.rand(3, 5), "needs labels that are classes"),
    ],
)
def test_without_a_loss_of_known_kind_only_norms_are_scored(
    kind: type[PreTrainedModel], labels: torch.Tensor, said: str
) -> None:
    classes = 2 if kind is BertForQuestionAnswering else 5
    model = make(kind, BertConfig(**(_BERT | {"num_labels": classes})))
    batch = {"input_ids": IDS, "labels": labels}
    with pytest.raises(ConfigError, match=said) as caught:
        score_heads(model, [batch], "gate_gradient")
    assert "output_norm or random" in str(caught.value.valid)
    assert score_heads(model, [batch], "output_norm").tokens == IDS.numel()


def test_a_head_that_is_not_in_the_checkpoint_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(BertModel, BertConfig(**_BERT)).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    batch = {"input_ids": IDS, "labels": CLASSES}
    score_heads(model, [batch], "output_norm")
    assert "not in the checkpoint" not in capsys.readouterr().out
    for _ in range(2):
        score_heads(model, [batch], "gate_gradient")
    assert capsys.readouterr().out.count("classifier.bias was not in the checkpoint: unless") == 1
    model.save_pretrained(tmp_path)
    whole = BertForSequenceClassification.from_pretrained(tmp_path)
    score_heads(whole, [batch], "gate_gradient")
    assert "not in the checkpoint" not in capsys.readouterr().out
