"""What calibration adds on top of the closed form, on text that it has not seen.

On the model that the project trained: few windows, text of another kind, one window many times.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import textwrap
import typing
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.data.parts import extract_part
from surgery.execute.live import apply_
from surgery.models.source import find_embedded_dir, make_byte_tokenizer
from surgery.plan.registry import parse_operations

LENGTH = 128
MERGE = {"gqa": {"kv_heads": 2, "merge": "optimal"}}
PRUNE = {"prune_heads": {"heads": [1, 4, 6], "refit": True}}


def cut_windows(text: str, count: int) -> torch.Tensor:
    """Cut windows out of a text, evenly spread."""
    ids = make_byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    starts = torch.linspace(0, len(ids) - LENGTH, count).long().tolist()
    return torch.stack([torch.tensor(ids[start : start + LENGTH]) for start in starts])


def read_module(module: ModuleType, part: Any = None) -> str:
    text = inspect.getsource(module)
    return text if part is None else extract_part(text, part) or ""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(find_embedded_dir(), dtype=torch.float32).eval()


UNSEEN = cut_windows(read_module(argparse), 24)
TEXTS = {
    "two windows": cut_windows(read_module(typing), 2),
    "eight windows": cut_windows(read_module(typing), 8),
    "prose": cut_windows(str(argparse.__doc__) + str(inspect.__doc__) + str(typing.__doc__), 8),
    "one window": cut_windows(read_module(textwrap), 1).expand(8, -1),
    "one sentence": cut_windows("The quick brown fox jumps over the lazy dog. " * 60, 8),
}


@torch.no_grad()
def compute_loss(model: PreTrainedModel) -> float:
    return float(model(input_ids=UNSEEN, labels=UNSEEN).loss)


def cut(model: PreTrainedModel, attention: Any, text: torch.Tensor, **options: Any) -> float:
    operations = copy.deepcopy(attention)
    if "prune_heads" in operations:
        operations["prune_heads"]["refit"] = options["refit"]
        if not options["refit"]:
            made = make_calibrated_plan(model, parse_operations(operations), [])
            return compute_loss(apply_(copy.deepcopy(model), made))
    batches = [{"input_ids": part} for part in text.split(2)]
    plan = make_calibrated_plan(
        model, parse_operations(operations), batches, Calibration(rows=16, **options)
    )
    return compute_loss(apply_(copy.deepcopy(model), plan))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("attention", [MERGE, PRUNE], ids=["merge", "prune"])
def test_fitting_all_layers_together_raises_no_loss(
    model: PreTrainedModel, attention: Any, name: str
) -> None:
    without, fitted = (
        cut(model, attention, TEXTS[name], refit=True, refine_steps=0, joint_steps=steps)
        for steps in (0, 24)
    )
    assert fitted <= without


@pytest.mark.parametrize("name", TEXTS)
def test_a_refit_after_pruning_raises_no_loss(model: PreTrainedModel, name: str) -> None:
    without = cut(model, PRUNE, TEXTS[name], refit=False)
    assert cut(model, PRUNE, TEXTS[name], refit=True) <= without


@pytest.mark.parametrize("name", TEXTS)
def test_neither_steps_nor_a_refit_raise_the_loss_of_a_merge(
    model: PreTrainedModel, name: str
) -> None:
    plain = cut(model, MERGE, TEXTS[name], refit=False, refine_steps=0, joint_steps=0)
    refit = cut(model, MERGE, TEXTS[name], refit=True, refine_steps=0, joint_steps=0)
    both = cut(model, MERGE, TEXTS[name], refit=True, refine_steps=12, joint_steps=0)
    print(name, plain, refit, both)
    assert refit <= plain
    assert both <= plain
