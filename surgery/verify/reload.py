"""Load an export again, and check that it computes the same as the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.errors import SurgeryError

# Reloading does not change arithmetic, so any difference above rounding is a fault.
TOLERANCE = 1e-6
TOKENS = 32


@torch.inference_mode()
def check_reload(model: PreTrainedModel, directory: Path) -> float:
    """Compute the largest difference between the logits of `model` and of its copy on disk.

    Args:
        model: in eval mode, on the CPU.
        directory: where it was saved.

    Raises:
        SurgeryError: the difference is more than `TOLERANCE`.
    """
    reloaded = type(model).from_pretrained(directory, dtype=model.dtype).eval()
    reloaded.set_attn_implementation(model.config._attn_implementation)
    tokens = torch.arange(3, 3 + TOKENS)[None] % model.config.get_text_config().vocab_size
    outputs: list[Any] = [one(input_ids=tokens).logits.float() for one in (model, reloaded)]
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:
        raise SurgeryError(
            f"the export does not reload to the same model: logits differ by {difference:.3g}; "
            f"it stays in {directory} for inspection"
        )
    return difference
