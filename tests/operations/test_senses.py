"""Heads of models that hear or see, with inputs made from what their own code asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PreTrainedModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from benchmarks.coverage.oracles import heads_silenced
from surgery.errors import PlanError
from surgery.execute.live import apply_
from surgery.models.probe import make_probe_inputs
from surgery.models.sites import find_sites
from surgery.models.tiny import randomize_
from tests.operations.zoo_models import assert_other, assert_same, operated, plan_of

BOTH = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_model": 32,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
EYES = {**BODY, "image_size": 16, "patch_size": 8}
WORDS = {**BODY, "vocab_size": 97, "max_position_embeddings": 32, **TOKENS}


def _build_whisper() -> PreTrainedModel:
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
    config = WhisperConfig(vocab_size=97, **BOTH, **sizes, **TOKENS)
    return WhisperForConditionalGeneration._from_config(config, attn_implementation="eager")


def _build_speech_to_text() -> PreTrainedModel:
    sizes = {"input_feat_per_channel": 8, "max_source_positions": 99, "max_target_positions": 32}
    config = Speech2TextConfig(vocab_size=97, **BOTH, **sizes, **TOKENS, conv_channels=16)
    return Speech2TextForConditionalGeneration._from_config(config, attn_implementation="eager")


def _build_wav2vec2() -> PreTrainedModel:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    sizes = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(vocab_size=31, **BODY, **convolutions, **sizes)
    return Wav2Vec2ForCTC._from_config(config, attn_implementation="eager")


def _build_ast() -> PreTrainedModel:
    config = ASTConfig(**BODY, max_length=24, num_mel_bins=16, patch_size=8, num_labels=5)
    return ASTForAudioClassification._from_config(config, attn_implementation="eager")


def _build_clip() -> PreTrainedModel:
    config = CLIPConfig(text_config={**WORDS}, vision_config={**EYES}, projection_dim=16)
    return CLIPModel._from_config(config, attn_implementation="eager")


def _build_clip_vision() -> PreTrainedModel:
    return CLIPVisionModel._from_config(CLIPVisionConfig(**EYES), attn_implementation="eager")


def _build_blip() -> PreTrainedModel:
    text = {**WORDS, "sep_token_id": 4, "encoder_hidden_size": 32, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config={**EYES}, projection_dim=16)
    return BlipForConditionalGeneration._from_config(config, attn_implementation="eager")


def _build_captioner() -> PreTrainedModel:
    decodes = {"is_decoder": True, "add_cross_attention": True}
    text = BertConfig(**{**WORDS, **decodes})
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**EYES), text)
    return VisionEncoderDecoderModel._from_config(config, attn_implementation="eager")


def _build_video() -> PreTrainedModel:
    config = VideoMAEConfig(**EYES, num_frames=4, tubelet_size=2, num_labels=5)
    return VideoMAEForVideoClassification._from_config(config, attn_implementation="eager")


BUILDERS: dict[str, tuple[Callable[[], PreTrainedModel], set[str], int]] = {
    # Name → how it is built, what its probe must hold, and how many sites it has.
    "whisper": (_build_whisper, {"input_features", "decoder_input_ids"}, 6),
    "speech_to_text": (_build_speech_to_text, {"input_features", "decoder_input_ids"}, 6),
    "wav2vec2": (_build_wav2vec2, {"input_values"}, 2),
    "ast": (_build_ast, {"input_values"}, 2),
    "clip": (_build_clip, {"input_ids", "pixel_values"}, 2),
    "clip_vision": (_build_clip_vision, {"pixel_values"}, 2),
    "blip": (_build_blip, {"input_ids", "pixel_values"}, 4),
    "captioner": (_build_captioner, {"pixel_values", "decoder_input_ids"}, 6),
    "video": (_build_video, {"pixel_values"}, 2),
}


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return randomize_(BUILDERS[name][0](), seed=0).eval().double()


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    found = model(**inputs)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if found.get(key) is not None:
            return found[key]
    raise AssertionError(list(found))


@pytest.mark.parametrize("name", BUILDERS)
def test_heads_that_go_are_silent(name: str) -> None:
    """Another head in every site: encoder, decoder, cross-attention."""
    model = built(name)
    original, sites = copy.deepcopy(model), find_sites(model).sites
    _, asked, count = BUILDERS[name]
    assert len(sites) == count
    heads = {site.layer: [site.layer % 4, (site.layer + 1) % 4] for site in sites}
    inputs = make_probe_inputs(model, cross=any(site.cross for site in sites))
    assert asked <= set(inputs) <= asked | {"use_cache"}
    before = output(original, inputs)
    with heads_silenced(original, sites, {site.path: heads[site.layer] for site in sites}):
        expected = output(original, inputs)
    model, plan = operated(model, prune_heads={"heads": heads})
    assert [site.q_heads for site in plan.after] == [2] * count
    assert_same(output(model, inputs), expected)
    assert_other(before, expected)


@pytest.mark.parametrize("name", ["whisper", "captioner"])
def test_what_is_saved_is_read_again(name: str, tmp_path: Any) -> None:
    model, plan = operated(built(name), prune_heads={"heads": {0: [1], 3: [2], 5: [0]}})
    assert plan.export.format == "record"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs, state = make_probe_inputs(model), model.state_dict()
    assert_same(output(loaded, inputs), output(model, inputs))
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


def test_whisper_generates_with_fewer_heads() -> None:
    model, _ = operated(built("whisper"), prune_heads={"heads": [1]})
    features = make_probe_inputs(model)["input_features"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = [
        model.generate(features, use_cache=cache, **options).tolist() for cache in (True, False)
    ]
    assert found[0] == found[1]


def test_inputs_that_are_not_known_are_asked_for() -> None:
    """A model of time series takes neither tokens, images nor sound."""
    sizes = {"d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = PatchTSTConfig(context_length=32, patch_length=8, prediction_length=4, **sizes)
    model = randomize_(PatchTSTForPrediction(config), seed=0).eval()
    original, sites = copy.deepcopy(model), find_sites(model).sites
    plan = plan_of(model, {"prune_heads": {"heads": [1]}})
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match="a PatchTSTForPrediction needs others than these") as error:
        apply_(model, plan)
    assert "probe={name: tensor}" in str(error.value)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    inputs = {"past_values": torch.linspace(-1, 1, 32)[None, :, None].sin()}
    with torch.no_grad(), heads_silenced(original, sites, {site.path: [1] for site in sites}):
        expected = original(**inputs).prediction_outputs
    model = apply_(model, plan, probe=inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).prediction_outputs, expected)
