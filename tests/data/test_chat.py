"""Conversations: rendered as the tokenizer's chat template does it, learnt whole or by answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from surgery.config.schema import Task
from surgery.data.collate import IGNORED
from surgery.data.sources import check_source
from surgery.errors import ConfigError
from surgery.models.source import make_byte_tokenizer
from tests.data.making import (
    EOS,
    VOCAB,
    all_rows,
    data_config,
    ids_of,
    text_data,
    word_tokenizer,
    write_rows,
)

# A word per role, then what is said; the assistant ends what it says.
SAID = "{{ m.content + ' </s>' }}"
MARKED = "{% generation %}" + SAID + "{% endgeneration %}"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'w50 ', 'user': 'w51 ', 'assistant': 'w52 ', 'tool': 'w53 '}[m.role] }}"
    "{% if m.role == 'assistant' %}" + SAID + "{% else %}{{ m.content }}{% endif %}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w52 ' }}{% endif %}"
)
LONG = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7"},
]
LONG_IDS = [*ids_of("w50 w1 w51 w2 w3 w52 w4 w5"), EOS, *ids_of("w51 w6 w52 w7"), EOS]
LONG_ANSWERS = [6, 7, 8, 12, 13]
SHORT = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9 w10"}]
SHORT_IDS = [*ids_of("w51 w8 w52 w9 w10"), EOS]
SHORT_ANSWERS = [3, 4, 5]
UNANSWERED = [{"role": "user", "content": "w11 w12"}]
PADDED = {"layout": "padded", "seq_len": 30, "text_column": "messages"}


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = word_tokenizer(begins=True, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def make_data(path: Path, rows: list[Any], tokenizer: Any = None, **fields: Any) -> Any:
    """`TextData` over rows of messages (or over rows as they are), held out from the same file."""
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    file = write_rows(path / "rows.jsonl", rows)
    return text_data(file, tokenizer or make_tokenizer(), val_path=file, **{**PADDED, **fields})


def read_labels(data: Any) -> list[list[int]]:
    """Per row, the places that are learnt."""
    return [
        [place for place, label in enumerate(data._collate([row])["labels"][0]) if label != IGNORED]
        for row in all_rows(data)
    ]


def test_a_row_is_what_the_template_makes_of_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    data = make_data(tmp_path, [LONG, SHORT, UNANSWERED], tokenizer)
    rows = [row["input_ids"] for row in all_rows(data)]
    assert rows[:2] == [LONG_IDS, SHORT_IDS]
    for messages, row in zip([LONG, SHORT, UNANSWERED], rows, strict=True):
        assert row == tokenizer.apply_chat_template(messages, return_dict=False)
    assert read_labels(data) == [list(range(len(row))) for row in rows]


@pytest.mark.parametrize("streaming", ["never", "always"])
@pytest.mark.parametrize("marked", [True, False])
def test_the_answers_alone(marked: bool, streaming: str, tmp_path: Path) -> None:
    """Marks in the template and the beginnings of the conversation say the same."""
    template = TEMPLATE.replace(SAID, MARKED) if marked else TEMPLATE
    tokenizer = make_tokenizer(template)
    fields = {"loss_on": "assistant", "streaming": streaming}
    data = make_data(tmp_path, [LONG, UNANSWERED, SHORT], tokenizer, **fields)
    assert read_labels(data) == [LONG_ANSWERS, SHORT_ANSWERS]  # nothing to learn in the other
    assert [row["input_ids"] for row in all_rows(data)] == [LONG_IDS, SHORT_IDS]
    if marked:
        theirs = tokenizer.apply_chat_template(
            LONG, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        assert [place for place, mark in enumerate(theirs) if mark] == LONG_ANSWERS


def test_the_loss_is_that_of_the_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = make_data(tmp_path, [LONG, SHORT], loss_on="assistant", batch_size=2)
    batch = data._collate(all_rows(data))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    losses = []
    for ids, answers in ((LONG_IDS, LONG_ANSWERS), (SHORT_IDS, SHORT_ANSWERS)):
        tokens = torch.tensor(ids)
        logits = model(tokens[None]).logits[0]
        losses += [F.cross_entropy(logits[place - 1], tokens[place]) for place in answers]
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("isolate", [True, False])
def test_packed_windows(isolate: bool, tmp_path: Path) -> None:
    """Windows without anything to learn are left out; the others learn the answers."""
    conversations = [UNANSWERED, SHORT, UNANSWERED, UNANSWERED, UNANSWERED, LONG, SHORT]
    ids, learnt, starts = [], [], []
    for one in conversations:
        own = make_tokenizer().apply_chat_template(one, return_dict=False)
        answers = {id(LONG): LONG_ANSWERS, id(SHORT): SHORT_ANSWERS}.get(id(one), [])
        starts.append(len(ids))
        learnt += [place in answers for place in range(len(own))]
        ids += own
    fields = {"layout": "packed", "isolate_documents": isolate, "seq_len": 5}
    data = make_data(tmp_path, conversations, loss_on="assistant", **fields)
    wanted = [
        (ids[at : at + 5], [n for n in range(5) if learnt[at + n]])
        for at in range(0, len(ids) - 4, 5)
        if any(learnt[at + 1 : at + 5])
    ]
    found = list(zip([row["input_ids"] for row in all_rows(data)], read_labels(data), strict=True))
    assert len(found) < len(ids) // 5
    # The first token of a window is never predicted, so its label does not matter.
    assert [(i, [n for n in places if n]) for i, places in found] == [
        (i, [n for n in places if n]) for i, places in wanted
    ]
    assert all(("position_ids" in row) is isolate for row in all_rows(data))


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    )
    fields = {"seq_len": 100, "loss_on": "assistant"}
    messages = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "ça"}]
    data = make_data(tmp_path, [messages], tokenizer, **fields)
    (row,) = all_rows(data)
    first, second = "user: é?".encode(), "assistant: ça".encode()
    eos = tokenizer.eos_token_id
    assert row["input_ids"] == [*(b + 3 for b in first), eos, *(b + 3 for b in second), eos]
    # The template has no generation prompt, so the answer begins with its role.
    assert read_labels(data) == [list(range(len(first) + 1, len(row["input_ids"])))]


def test_prompts_and_completions(tmp_path: Path) -> None:
    """Plain text begins and ends as any document does, and its end is learnt."""
    rows = [{"prompt": "w1 w2 ", "completion": "w3"}, {"prompt": "", "completion": "w4 w5"}]
    fields = {"text_column": "prompt", "completion_column": "completion"}
    data = make_data(tmp_path, rows, loss_on="assistant", **fields)
    assert [row["input_ids"][1:] for row in all_rows(data)] == [
        [*ids_of("w1 w2 w3"), EOS],
        [*ids_of("w4 w5"), EOS],
    ]
    assert read_labels(data) == [[3, 4], [1, 2, 3]]
    whole = make_data(tmp_path, rows, **fields)
    assert [row["input_ids"] for row in all_rows(whole)] == [
        row["input_ids"] for row in all_rows(data)
    ]
    assert read_labels(whole) == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize("marked", [True, False])
def test_a_conversation_as_prompt(marked: bool, tmp_path: Path) -> None:
    """What the assistant said in the prompt is not learnt."""
    row = {"text": LONG[-1:], "prompt": LONG[:-1]}  # and the names are those of the other columns
    tokenizer = make_tokenizer(TEMPLATE.replace(SAID, MARKED) if marked else TEMPLATE)
    fields = {"text_column": "prompt", "completion_column": "text", "loss_on": "assistant"}
    data = make_data(tmp_path, [row], tokenizer, **fields)
    assert [row["input_ids"] for row in all_rows(data)] == [LONG_IDS]
    assert read_labels(data) == [[12, 13]]


def test_calls_of_tools_reach_the_template(tmp_path: Path) -> None:
    """Arrow gives every message every key; a template asks whether it is there."""
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}"
        "{{ 'w54 ' + m.tool_calls[0].function.arguments.items() | map('join', ' ') | join + ' ' }}"
        "{% else %}{{ 'w55 ' + m.content + ' ' }}{% endif %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"w1": "w2"}}}
    other = {"type": "function", "function": {"name": "f", "arguments": {"w3": "w4"}}}
    rows = [
        [
            {"role": "user", "content": "w5"},
            {"role": "assistant", "tool_calls": [made]},
            {"role": "tool", "content": "w6", "name": "f"},
        ]
        for made in (call, other)
    ]
    data = make_data(tmp_path, rows, make_tokenizer(template))
    assert [row["input_ids"] for row in all_rows(data)] == [
        ids_of("w55 w5 w54 w1 w2 w55 w6"),
        ids_of("w55 w5 w54 w3 w4 w55 w6"),
    ]


GOOD = {"role": "user", "content": "w1"}
BAD_ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no content": ([GOOD, {"role": "assistant"}], ("row 3", "message 2 has no content")),
    "no role": ([{"content": "w1"}], ("row 3", "message 1 has no role")),
    "another role": ([{"role": "gpt", "content": "w1"}], ("row 3", "unknown role", "gpt", "user")),
    "no list": ({"role": "user", "content": "w1"}, ("row",)),
    "no message": (["w1"], ("row",)),
}


@pytest.mark.parametrize("streaming", ["never", "always"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name: str, streaming: str, tmp_path: Path) -> None:
    row, words = BAD_ROWS[name]
    mixed = name in ("no list", "no message")  # Arrow reads one type per column
    rows = [{"messages": row}] * 3 if mixed else [[GOOD], [GOOD, GOOD], row]
    with pytest.raises(ConfigError) as caught:
        all_rows(make_data(tmp_path, rows, streaming=streaming))
    assert caught.value.key == "data.text_column"
    for word in words:
        assert word in str(caught.value)


def test_a_role_that_the_template_names(tmp_path: Path) -> None:
    template = TEMPLATE.replace("'tool'", "'critic'")
    row = [{"role": "critic", "content": "w1"}]
    data = make_data(tmp_path, [row], make_tokenizer(template))
    assert all_rows(data)[0]["input_ids"] == ids_of("w53 w1")
    refusing = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ConfigError, match="row 1: the chat template refuses it: no system role"):
        make_data(tmp_path, [LONG], make_tokenizer(refusing)).setup()


# As some reasoning models have it: what was thought is left out once the conversation goes on.
FORGETFUL = (
    "{% for m in messages %}{{ 'w51 ' if m.role == 'user' else 'w52 ' }}"
    "{% if m.role == 'assistant' and loop.last %}w53 {% endif %}{{ m.content + ' ' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("fields", "template", "rows", "key", "words"),
    [
        ({}, None, [LONG], "model.tokenizer", ("no chat template", "chat_template.jinja")),
        (
            {"loss_on": "assistant"},
            FORGETFUL,
            [SHORT, LONG[1:]],
            "data.loss_on",
            ("row 2: where message 2 stands", "generation"),
        ),
        (
            {"loss_on": "assistant"},
            TEMPLATE,
            [{"messages": "w1 w2"}],
            "data.loss_on",
            ("plain text", "all"),
        ),
        (
            {"loss_on": "assistant"},
            TEMPLATE,
            [UNANSWERED],
            "data.loss_on",
            ("training text has a token of an answer",),
        ),
        (
            {"completion_column": "answer"},
            TEMPLATE,
            [{"messages": "w1", "answer": "w1"}, {"messages": "w1", "answer": None}],
            "data.completion_column",
            ("row 2: the completion is not text",),
        ),
        (
            {"completion_column": "nowhere"},
            TEMPLATE,
            [{"messages": "w1"}],
            "data.completion_column",
            ("no such column", "nowhere"),
        ),
        (
            {"completion_column": "messages"},
            TEMPLATE,
            [{"messages": "w1"}],
            "data.completion_column",
            ("another column",),
        ),
        ({}, TEMPLATE, [[], []], "data.path", ("blank",)),
    ],
)
def test_what_cannot_be(
    fields: dict[str, Any],
    template: str | None,
    rows: list[Any],
    key: str,
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_data(tmp_path, rows, make_tokenizer(template), **fields).setup()
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


def test_other_tasks_take_text(tmp_path: Path) -> None:
    data = make_data(tmp_path, [LONG])
    data.task = Task.sequence_classification
    with pytest.raises(ConfigError, match="label"):
        data.setup()
    rows = [{"messages": LONG, "label": 0}]
    data = make_data(tmp_path, rows)
    data.task = Task.sequence_classification
    with pytest.raises(ConfigError, match="are for causal_lm") as caught:
        data.setup()
    assert caught.value.key == "data.text_column"


@pytest.mark.parametrize(
    ("key", "value"), [("completion_column", "answer"), ("loss_on", "assistant")]
)
def test_the_standard_library_has_none(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="is not used by data=stdlib") as caught:
        check_source(data_config("stdlib", **{key: value}))
    assert caught.value.key == f"data.{key}"
