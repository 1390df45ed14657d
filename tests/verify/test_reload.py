"""An export is what was saved, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError
from surgery.verify.reload import TOLERANCE, check_reload
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_was_saved_reloads(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type).eval()
    model.save_pretrained(tmp_path)
    assert check_reload(model, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_another_weight_is_refused(value: float, tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += torch.tensor(value)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="does not reload to the same model"):
        check_reload(model, tmp_path)
