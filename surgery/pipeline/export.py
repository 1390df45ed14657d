"""The stage `export`: write a directory that other software loads, complete or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from surgery.config.schema import Dtype
from surgery.console import say
from surgery.lab.report.card import render_card
from surgery.models.length import read_length, state_tokenizer_length_
from surgery.pipeline.files import CARD, EXPORT, EXPORT_DRAFT, EXPORT_OLD, RECORD
from surgery.pipeline.session import Session
from surgery.pipeline.summary import summarize
from surgery.plan.registry import restore_saved_form_
from surgery.verify.reload import check_reload


def export(session: Session) -> None:
    """Write the export under another name, check it, then rename it to `export/`.

    Raises:
        SurgeryError: it does not reload to the same model; then it keeps its first name.
    """
    run, plan = session.run, session.plan
    model = session.load_model().cpu().eval()
    restore_saved_form_(model)
    final, draft = session.run_dir / EXPORT, session.run_dir / EXPORT_DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    if run.export.dtype is not Dtype.auto:
        _cast_weights(model, getattr(torch, run.export.dtype.value))
    model.save_pretrained(draft, max_shard_size=run.export.max_shard_size)
    original = session.source.load_config()
    assert session.prepared.loaded_tokenizer is not None
    tokenizer = copy.deepcopy(session.prepared.loaded_tokenizer)
    state_tokenizer_length_(tokenizer, original, model.config)
    tokenizer.save_pretrained(draft)
    _share_weights(draft)
    record = {"plan": plan.to_json(), "training": session.results.training}
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    difference = check_reload(model, draft) if run.export.verify else None
    size = sum(file.stat().st_size for file in draft.glob("*.safetensors"))
    session.results.export = {
        "path": EXPORT,
        "format": plan.export.format,
        "reason": plan.export.reason,
        "runtimes": list(plan.export.runtimes),
        "without": dict(plan.export.without),
        "positions": read_length(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": size,
        "max_logit_difference_after_reload": difference,
    }
    (draft / CARD).write_text(render_card(summarize(session), session.whole_plan.outcomes))
    _replace_folder(draft, final, session.run_dir / EXPORT_OLD)
    say(f"  {final}: {size / 1e6:.1f} MB, {plan.export.format}")


def _replace_folder(draft: Path, final: Path, old: Path) -> None:
    """Put `draft` in the place of `final`, which is never there in part."""
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _share_weights(folder: Path) -> None:
    """Give weights the permissions of other new files; safetensors makes them private."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast only what is saved: `model.to` would round the frequencies of RoPE too."""
    saved = model.state_dict(keep_vars=True)
    for tensor in saved.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
