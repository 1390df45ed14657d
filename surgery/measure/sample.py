"""Text that a model writes, for a person to read beside what it wrote before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.module import TextData
from surgery.models.forward import evaluating, find_device
from surgery.models.sites import get_text_config

# Asked of a model whose tokenizer has a chat template, each in a conversation of its own.
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the words of a text in reverse order.",
    "Give me three tips for sleeping better.",
)
# Of a model that only continues text: this many held-out texts, and tokens of each.
TEXTS, TOKENS = 3, 48
# Windows that are looked at for them: many a beginning is mostly blank.
_LOOKED_AT = 24


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        text: as a person reads it: without the chat template.
        ids: the tokens, with it.
    """

    text: str
    ids: list[int]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, data: TextData, texts: Sequence[str] | None
) -> list[Prompt]:
    """Make prompts of `texts`: through the chat template if the tokenizer has one.

    Args:
        texts: ``None``: `QUESTIONS` if there is a template, else the beginnings of held-out texts.
    """
    if getattr(tokenizer, "chat_template", None):
        return [Prompt(text, _apply_template(tokenizer, text)) for text in texts or QUESTIONS]
    if texts:
        return [Prompt(text, list(tokenizer(text)["input_ids"])) for text in texts]
    return _cut_held_out(tokenizer, data)


def _apply_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    # The template has written the special tokens.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _cut_held_out(tokenizer: PreTrainedTokenizerBase, data: TextData) -> list[Prompt]:
    found: list[Prompt] = []
    for batch in data.load_held_out_batches(_LOOKED_AT, 1):
        row = batch["input_ids"][0]
        if "attention_mask" in batch and batch["attention_mask"].ndim == 2:
            row = row[batch["attention_mask"][0].bool()]
        ids = row[: max(1, min(TOKENS, len(row) // 2))].tolist()
        found.append(Prompt(str(tokenizer.decode(ids, skip_special_tokens=True)), ids))
    return sorted(found, key=_is_blank)[:TEXTS]


def _is_blank(prompt: Prompt) -> bool:
    return sum(not letter.isspace() for letter in prompt.text) < len(prompt.text) / 2


@torch.no_grad()
def write_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, new_tokens: int
) -> str:
    """Let the model go on from a prompt: at each step the likeliest token, until it says the end.

    Args:
        new_tokens: at most. A prompt that leaves the model no positions for them loses its start.
    """
    ids, limit = prompt.ids, getattr(get_text_config(model.config), "max_position_embeddings", None)
    if isinstance(limit, int) and len(ids) + new_tokens > limit:
        new_tokens = min(new_tokens, max(1, limit // 2))
        ids = ids[-max(1, limit - new_tokens) :]
    inputs = torch.tensor([ids], device=find_device(model))
    own = model.generation_config
    stops = own.eos_token_id if own is not None else None
    stops = tokenizer.eos_token_id if stops is None else stops
    pad = stops[0] if isinstance(stops, list) else stops
    # Everything else that a model's own settings may ask for is left out: penalties, beams, draws.
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=pad,
    )
    kept, model.generation_config = own, settings
    try:
        with evaluating(model):
            generate: Any = model.generate  # a mixin that not all models have
            written = generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
            )
    finally:
        model.generation_config = kept
    return str(tokenizer.decode(written[0, len(ids) :].tolist(), skip_special_tokens=True))
