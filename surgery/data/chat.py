"""Render conversations by the tokenizer's chat template, and find where their answers stand.

The shapes of rows are those of trl: `messages`, a list of {role, content}; or a prompt and its
completion, both text or both such lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from surgery.config.schema import DataConfig, LossOn
from surgery.data.cache import hash_tokenizer, make_fingerprint
from surgery.errors import ConfigError

TEXT = "text"
COMPLETION = "completion"
# Where the answers stand in a text: pairs of characters, the second one excluded.
ANSWERS = "answers"

ROLES = ("system", "developer", "user", "assistant", "tool")
_ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PEEKED = 1000  # rows looked at for a value that is not null
# What a template may raise: its own `raise_exception`, and Python's errors in its expressions.
_BAD_TEMPLATE = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)

Message = dict[str, Any]
Span = tuple[int, int]


def has_messages(documents: Any) -> bool:
    """Whether the text column holds conversations, by its first value that is not null."""
    for row in islice(documents, _PEEKED):
        if row[TEXT] is not None:
            return isinstance(row[TEXT], list | dict)
    return False


def render_rows(
    documents: Any, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, *, conversations: bool
) -> Any:
    """Make rows of `text`, with `answers` if `data.loss_on` is `assistant`.

    Args:
        documents: rows of `text` and, if `data.completion_column` is set, `completion`.
        conversations: whether these are lists of messages.

    Raises:
        ConfigError: the tokenizer has no chat template, or, once rows are read, a row is not as it
            must be; the message says its number, counted from 1.
    """
    template = _get_template(tokenizer, cfg) if conversations else ""
    features: dict[str, Any] = {TEXT: datasets.Value("string")}
    marked = cfg.loss_on is LossOn.assistant
    if marked:
        features[ANSWERS] = datasets.List(datasets.List(datasets.Value("int64")))

    def render(batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rendered: dict[str, list[Any]] = {name: [] for name in features}
        completions = batch.get(COMPLETION, [None] * len(numbers))
        for number, text, completion in zip(numbers, batch[TEXT], completions, strict=True):
            row = _Row(number + 1, cfg, tokenizer, template)
            if text is not None:
                build = row.render_messages if conversations else row.join_texts
                text, answers = build(text, completion, marked=marked)
                if marked:
                    rendered[ANSWERS].append(answers)
            elif marked:
                rendered[ANSWERS].append([])
            rendered[TEXT].append(text)
        return rendered

    options: dict[str, Any] = {}
    if isinstance(documents, datasets.Dataset):
        work = [hash_tokenizer(tokenizer), conversations, cfg.completion_column, cfg.loss_on.value]
        options = make_fingerprint(documents, "render", *work)
        # Of streams with features, older releases of datasets cannot filter the rows.
        options["features"] = datasets.Features(features)
    return documents.map(
        render,
        batched=True,
        with_indices=True,
        remove_columns=list(documents.column_names or []),
        **options,
    )


def _get_template(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (AttributeError, NotImplementedError):
        return ""  # it renders by code
    except ValueError:
        raise ConfigError(
            "model.tokenizer",
            f"has no chat template, and data.text_column={cfg.text_column} holds conversations",
            valid="a tokenizer with a chat template (chat_template.jinja beside its other files), "
            "or a data.text_column of text",
        ) from None


class _Row:
    """One row of the data, and how its problems are told."""

    def __init__(
        self, number: int, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, template: str
    ) -> None:
        self._number = number
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._template = template

    def _refuse(self, problem: str, given: Any = None, valid: Any = None, key: str = "") -> Any:
        raise ConfigError(
            key or "data.text_column",
            f"row {self._number}: {problem}",
            given=None if given is None else repr(given)[:80],
            valid=valid,
        )

    def join_texts(
        self, prompt: Any, completion: Any, *, marked: bool
    ) -> tuple[str, Sequence[Span]]:
        """Join a prompt and its completion, which is the answer."""
        if not isinstance(prompt, str):
            self._refuse("is not text, as the rows before it are", prompt)
        if not isinstance(completion, str):
            self._refuse(
                "the completion is not text, as its prompt is",
                "nothing" if completion is None else completion,
                key="data.completion_column",
            )
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))]

    def render_messages(
        self, messages: Any, completion: Any, *, marked: bool
    ) -> tuple[str, Sequence[Span]]:
        """Render a conversation; of a prompt and its completion, only the latter has answers."""
        checked = self._check_messages(messages, "data.text_column")
        first = 0
        if self._cfg.completion_column is not None:
            first = len(checked)
            checked += self._check_messages(completion, "data.completion_column")
        if not checked:
            return "", []
        if not marked:
            return self._render(checked), []
        if _GENERATION.search(self._template):
            text, answers = self._render_marked(checked)
            if first:  # the marks say no message, so those of the prompt are counted
                prompt = self._render_marked(checked[:first])[1]
                answers = answers[len(prompt) :]
            return text, answers
        text = self._render(checked)
        return text, [
            self._find_answer(checked, index, text)
            for index in range(first, len(checked))
            if checked[index]["role"] == _ASSISTANT
        ]

    def _check_messages(self, messages: Any, key: str) -> list[Message]:
        if not isinstance(messages, list):
            self._refuse(
                "is no list of messages",
                "nothing" if messages is None else messages,
                valid="[{role: …, content: …}, …]",
                key=key,
            )
        return [
            self._check_message(message, f"message {place}", key)
            for place, message in enumerate(messages, start=1)
        ]

    def _check_message(self, message: Any, name: str, key: str) -> Message:
        if not isinstance(message, dict):
            self._refuse(f"{name} is no message", message, valid="{role, content}", key=key)
        # Arrow gives every message the keys of all messages.
        held: Message = _drop_nulls(message)
        role = held.get("role")
        if not isinstance(role, str) or not (role in ROLES or self._is_named(role)):
            problem = f"{name} has no role" if role is None else f"{name} has an unknown role"
            self._refuse(
                problem,
                list(held) if role is None else role,
                valid=f"{', '.join(ROLES)}, or a role that the chat template names",
                key=key,
            )
        content = held.get("content")
        if content is None and held.get("tool_calls"):
            return {**held, "content": None}
        if not isinstance(content, str | list):
            self._refuse(
                f"{name} has no content" if content is None else f"{name} has no text as content",
                list(held) if content is None else content,
                valid="content: text (a message of the assistant may have tool_calls instead)",
                key=key,
            )
        return held

    def _is_named(self, role: str) -> bool:
        return (
            bool(role) and re.search(rf"""['"]{re.escape(role)}['"]""", self._template) is not None
        )

    def _render(self, messages: list[Message], **options: Any) -> str:
        return str(
            self._try(self._tokenizer.apply_chat_template, messages, tokenize=False, **options)
        )

    def _render_marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Render by a template that marks its answers with {% generation %}."""
        rendered, spans = self._try(
            render_jinja_template,
            conversations=[messages],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return rendered[0], [(int(start), int(end)) for start, end in spans[0]]

    def _try(self, render: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return render(*arguments, **options)
        except _BAD_TEMPLATE as error:
            return self._refuse(f"the chat template refuses it: {' '.join(str(error).split())}")

    def _find_answer(self, messages: list[Message], index: int, text: str) -> Span:
        """Find the message in the rendered text: what comes before it, and what it ends."""
        before = ""
        if index:
            before = self._render(messages[:index], add_generation_prompt=True)
        until = self._render(messages[: index + 1])
        if not (text.startswith(until) and until.startswith(before)):
            self._refuse(
                f"where message {index + 1} stands is not clear: the chat template writes it, or "
                "what is before it, in another way once the conversation goes on",
                LossOn.assistant.value,
                valid="all, or a chat template that marks answers with {% generation %}",
                key="data.loss_on",
            )
        return len(before), len(until)


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _drop_nulls(below) for name, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_drop_nulls(below) for below in value]
    return value
