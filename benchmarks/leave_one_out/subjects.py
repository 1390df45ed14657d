"""What is measured: the embedded model and deeper ones, on windows of Python source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.data.collate import Batch
from surgery.data.stdlib import read_stdlib
from surgery.importance.leave_one_out import LeaveOneOut
from surgery.importance.table import HEADS
from surgery.importance.work import Work
from surgery.models.sites import find_sites
from surgery.models.source import find_embedded_dir

SEED = 0


@dataclass(frozen=True)
class Subject:
    """One model and the shape of its one batch.

    Attributes:
        layers: of a random Llama; ``None`` for the embedded model.
        hidden: its width; heads are 32 wide.
        rows, length: of the batch, in windows and bytes.
    """

    name: str
    rows: int
    length: int
    layers: int | None = None
    hidden: int = 256

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("embedded, 8 x 512", 8, 512),
        Subject("embedded, 1 x 512", 1, 512),
        Subject("embedded, 32 x 64", 32, 64),
        Subject("12 layers, 2 x 256", 2, 256, layers=12),
        Subject("tiny", 2, 16, layers=2, hidden=64),
    )
}
MEASURED = [name for name in SUBJECTS if name != "tiny"]


def build(subject: Subject) -> PreTrainedModel:
    """In fp32, on the CPU."""
    if subject.layers is None:
        model = AutoModelForCausalLM.from_pretrained(find_embedded_dir(), dtype=torch.float32)
        return model.eval()
    torch.manual_seed(SEED)
    heads = subject.hidden // 32
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=subject.hidden,
        intermediate_size=subject.hidden * 11 // 4,
        num_hidden_layers=subject.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def batch(subject: Subject) -> Batch:
    """Bytes of the standard library, as the embedded model's tokenizer has them."""
    wanted = subject.rows * subject.length
    text = bytearray()
    for document in read_stdlib().values():
        text += document.encode()
        if len(text) >= wanted:
            break
    ids = torch.tensor(list(text[:wanted])).view(subject.rows, subject.length) + 3
    return {"input_ids": ids, "labels": ids.clone()}


def scorer(model: PreTrainedModel, *, share: bool, sites: int | None = None) -> LeaveOneOut:
    """Scores of query heads by label loss, as `score_heads` makes them by default.

    Args:
        sites: how many of the model's, from the first; ``None``: all.
    """
    some = find_sites(model).sites[:sites]
    work = Work(model, some, [HEADS], Task.causal_lm, ObjectiveName.lm, SEED, 32)
    return LeaveOneOut(work, share=share)
