"""How sampled documents begin: what a model is given before it goes on by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from surgery.data.windows import encode, find_special_tokens
from surgery.errors import ConfigError

KEY = "data.self.prompts"
VOCABULARY, BEGIN, CHAT, TEXTS = "vocabulary", "begin", "chat", "texts"
# First tokens that are the likeliest ones after a token of the vocabulary: LLM-QAT takes 3 to 5.
GREEDY_TOKENS = 4

# Stands for what a user says. No template changes such a word.
_PLACE = "surgeryplaceholder"
_BAD_TEMPLATE = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True)
class Openings:
    """What documents may begin with.

    Attributes:
        kind: vocabulary, begin, chat or texts.
        choices: token ids of each opening; one of them is drawn for each document.
        answer: chat: token ids between what the user says and what the assistant answers.
    """

    kind: str
    choices: Sequence[Sequence[int]]
    answer: Sequence[int] = ()

    def draw(self, random: Random) -> list[int]:
        """Draw the first tokens of a document."""
        return list(self.choices[random.randrange(len(self.choices))])


def make_openings(
    prompts: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int, seq_len: int
) -> Openings:
    """Make the openings that `data.self.prompts` names.

    vocabulary is the way of LLM-QAT (arXiv:2305.17888, section 2.1), chat that of Magpie
    (arXiv:2406.08464): the model is given a conversation up to where the user begins to speak, and
    says both parts.

    Args:
        prompts: a kind, a list of texts, or ``None`` for chat where the tokenizer has a template,
            else vocabulary.
        vocabulary: number of tokens that the model knows.
        seq_len: an opening must be shorter.

    Raises:
        ConfigError: these are no prompts, the tokenizer lacks what they need, or they are too long.
    """
    if isinstance(prompts, list | tuple):
        openings = _open_by_texts(prompts, tokenizer)
    elif prompts is None:
        openings = _open_chat(tokenizer) or _open_by_vocabulary(tokenizer, vocabulary)
    elif prompts == VOCABULARY:
        openings = _open_by_vocabulary(tokenizer, vocabulary)
    elif prompts == BEGIN:
        openings = _open_by_begin(tokenizer)
    elif prompts == CHAT:
        found = _open_chat(tokenizer)
        if found is None:
            raise ConfigError(
                KEY,
                "the tokenizer has no chat template that shows where a user speaks",
                given=CHAT,
                valid=f"{VOCABULARY}, {BEGIN}, or a list of texts",
            )
        openings = found
    else:
        raise ConfigError(
            KEY,
            "unknown way to begin",
            given=prompts,
            valid=f"{VOCABULARY}, {BEGIN}, {CHAT}, a list of texts, or null",
        )
    longest = max(map(len, openings.choices)) + len(openings.answer)
    if longest >= seq_len:
        raise ConfigError(
            KEY,
            f"fills whole windows: {longest} tokens, and data.seq_len={seq_len}",
            given=prompts if isinstance(prompts, str) else openings.kind,
            valid=f"shorter prompts, or data.seq_len of {longest + 1} or more",
        )
    return openings


def _open_by_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Openings:
    before, _ = find_special_tokens(tokenizer)
    special = set(tokenizer.all_special_ids)
    known = range(min(vocabulary, len(tokenizer)))
    return Openings(VOCABULARY, [[*before, token] for token in known if token not in special])


def _open_by_begin(tokenizer: PreTrainedTokenizerBase) -> Openings:
    before, _ = find_special_tokens(tokenizer)
    if not before:
        single = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        before = [token for token in single if token is not None][:1]
    if not before:
        raise ConfigError(
            KEY,
            "the tokenizer has no token that begins or ends a text",
            given=BEGIN,
            valid=f"{VOCABULARY}, or a list of texts",
        )
    return Openings(BEGIN, [before])


def _open_by_texts(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Openings:
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(KEY, "must be texts that are not empty", given=list(texts))
    before, _ = find_special_tokens(tokenizer)
    return Openings(TEXTS, [[*before, *ids.tolist()] for ids in encode(tokenizer, list(texts))])


def _open_chat(tokenizer: PreTrainedTokenizerBase) -> Openings | None:
    """Read from the chat template what stands before a user's words, and after them."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
        )
    except (*_BAD_TEMPLATE, NotImplementedError):
        return None
    parts = str(text).split(_PLACE)
    if len(parts) != 2 or not parts[0]:
        return None
    before, between = (ids.tolist() for ids in encode(tokenizer, parts, parse_special=True))
    return Openings(CHAT, [before], between)
