"""A text model beside a vision tower: one is operated on, the other is not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery.execute.live import apply_
from tests.families import logits, randomised
from tests.operations.reference import gqa_plan


def gemma3() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gemma3",
        text_config={
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        boi_token_index=58,
        eoi_token_index=59,
        image_token_index=60,
    )
    return randomised(AutoModelForCausalLM.from_config(config), 0, torch.float32)


def test_the_text_models_config_and_layers_change_and_the_tower_stays(tmp_path: Path) -> None:
    model, ids = gemma3(), torch.arange(3, 15)[None]
    tower = {k: t.clone() for k, t in model.state_dict().items() if "vision" in k}
    plan = gqa_plan(model, 2)
    assert dict(plan.head_patch) == {"text_config.num_key_value_heads": 2}
    assert plan.export.format == "native"
    assert all("vision" in block.path for block in plan.left_alone)
    apply_(model, plan)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in tower.items())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reloaded.config.text_config.num_key_value_heads == 2
    torch.testing.assert_close(logits(reloaded, ids), logits(model, ids), rtol=0, atol=1e-6)
