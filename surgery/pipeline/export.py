"""The export stage: a directory that ordinary software loads, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.config.schema import Dtype
from surgery.console import say
from surgery.errors import SurgeryError
from surgery.lab.report.card import render_card
from surgery.pipeline.session import Session
from surgery.pipeline.summary import summarize
from surgery.plan.registry import restore_saved_form_

RECORD = "surgery.json"
# Reloading changes no arithmetic; anything above rounding noise is a fault.
TOLERANCE = 1e-6


def export(session: Session) -> None:
    """Write `export/` beside its final name, check it, then rename it."""
    run = session.run
    model = session.loaded().cpu().eval()
    restore_saved_form_(model)
    assert session.tokenizer is not None
    final = session.run_dir / "export"
    draft = session.run_dir / "export.partial"
    shutil.rmtree(draft, ignore_errors=True)
    if run.export.dtype is not Dtype.auto:
        _cast_weights(model, getattr(torch, run.export.dtype.value))
    model.save_pretrained(draft, max_shard_size=run.export.max_shard_size)
    session.tokenizer.save_pretrained(draft)
    _share(draft)
    record = {"plan": session.plan.to_json(), "training": session.training}
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    difference = _reload_difference(model, draft) if run.export.verify else None
    session.export = {
        "path": final.name,
        "format": session.plan.export.format,
        "reason": session.plan.export.reason,
        "runtimes": list(session.plan.export.runtimes),
        "without": dict(session.plan.export.without),
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": sum(f.stat().st_size for f in draft.glob("*.safetensors")),
        "max_logit_difference_after_reload": difference,
    }
    card = render_card(summarize(session), session.whole_plan.outcomes)
    (draft / "README.md").write_text(card)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    say(f"  {final}: {session.export['bytes'] / 1e6:.1f} MB, {session.plan.export.format}")


def _share(folder: Path) -> None:
    """Give weights the permissions of any other new file; safetensors writes them private."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what is saved, and nothing else: `model.to` would round RoPE's frequencies too."""
    saved = model.state_dict(keep_vars=True)
    for tensor in saved.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


@torch.inference_mode()
def _reload_difference(model: PreTrainedModel, directory: Path) -> float:
    """Largest logit difference between `model` and its reloaded self.

    Raises:
        SurgeryError: it is more than rounding.
    """
    reloaded = type(model).from_pretrained(directory, dtype=model.dtype)
    reloaded.set_attn_implementation(model.config._attn_implementation)
    input_ids = torch.arange(3, 35)[None] % model.config.get_text_config().vocab_size
    outputs: list[Any] = [m(input_ids=input_ids).logits.float() for m in (model, reloaded.eval())]
    difference = float((outputs[0] - outputs[1]).abs().max())
    if difference > TOLERANCE:
        raise SurgeryError(
            f"the export does not reload to the same model: logits differ by {difference:.3g}; "
            f"it was left in {directory} for a look"
        )
    return difference
