"""What a model writes: the likeliest token at each step, whatever its own settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from surgery.config.schema import Task
from surgery.measure.sample import QUESTIONS, Prompt, make_prompts, write_on
from surgery.models.source import make_byte_tokenizer
from tests.data.making import text_data, word_tokenizer, write_texts
from tests.tiny_models import tiny_model

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def decode_by_hand(model: Any, ids: list[int], steps: int) -> list[int]:
    """The whole text again at every step, and the likeliest token: no cache, no `generate`."""
    found = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_likeliest_token_at_each_step(name: str) -> None:
    model, tokenizer = tiny_model(name).train(), word_tokenizer()
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=10**6
    )
    model.generation_config, prompt = own, Prompt("", [7, 8, 9])
    before = torch.get_rng_state()
    written = write_on(model, tokenizer, prompt, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is own
    assert written == tokenizer.decode(decode_by_hand(model.eval(), prompt.ids, 6))
    assert written


def test_it_stops_where_the_model_says_the_end() -> None:
    model, tokenizer = tiny_model("llama").eval(), word_tokenizer()
    first, second, *_ = decode_by_hand(model, [7, 8, 9], 2)
    model.generation_config = GenerationConfig(eos_token_id=[second, 10**6])
    written = write_on(model, tokenizer, Prompt("", [7, 8, 9]), 6)
    assert written in (tokenizer.decode([first, second]), tokenizer.decode([first]))


def test_a_prompt_longer_than_the_model_loses_its_start() -> None:
    model = tiny_model("llama", max_position_embeddings=12).eval()
    model.generation_config = GenerationConfig(eos_token_id=10**6)
    tokenizer, ids = word_tokenizer(), list(range(5, 45))
    written = write_on(model, tokenizer, Prompt("", ids), 4)
    assert written == tokenizer.decode(decode_by_hand(model, ids[-8:], 4))


def test_questions_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(begins=True, bos_token="<s>")
    tokenizer.chat_template = CHAT
    data = text_data(write_texts(tmp_path / "a.jsonl", ["w1 w2"]), tokenizer, val_fraction=0.5)
    (prompt,) = make_prompts(tokenizer, data, ["w1 w2"])
    assert prompt.text == "w1 w2"
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == ["<s>", "<unk>", "w1", "w2", "w9"]
    assert [one.text for one in make_prompts(tokenizer, data, None)] == list(QUESTIONS)


def test_a_model_without_a_template_continues_texts(tmp_path: Path) -> None:
    """Its own are held-out ones; those that are blank come last."""
    tokenizer = make_byte_tokenizer()
    held_out = [" " * 60, *(f"text {n} " * 8 for n in range(4))]
    data = text_data(
        write_texts(tmp_path / "a.jsonl", ["some text to train on " * 4]),
        tokenizer,
        val_path=write_texts(tmp_path / "b.jsonl", held_out),
        layout="padded",
        seq_len=32,
        task=Task.causal_lm,
    )
    (prompt,) = make_prompts(tokenizer, data, ["def f"])
    assert prompt.ids == tokenizer("def f")["input_ids"]
    found = make_prompts(tokenizer, data, None)
    assert len(found) == 3
    for prompt in found:
        assert "text" in prompt.text
        assert prompt.text == tokenizer.decode(prompt.ids, skip_special_tokens=True)
        assert len(prompt.ids) <= 16
