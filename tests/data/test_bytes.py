"""The byte tokenizer's fast path is the tokenizer itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from surgery.data.windows import encode
from surgery.models.source import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


@given(
    st.text().filter(lambda text: not any(spelt in text for spelt in TOKENIZER.all_special_tokens))
)
def test_fast_path_equals_the_tokenizer(text: str) -> None:
    (fast,) = encode(TOKENIZER, [text])
    assert fast.tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(st.text())
def test_ids_minus_three_are_the_bytes(text: str) -> None:
    (ids,) = encode(TOKENIZER, [text])
    assert bytes((ids - 3).tolist()) == text.encode()


def test_a_spelt_special_token_stays_text() -> None:
    (ids,) = encode(TOKENIZER, ["</s>"])
    assert bytes((ids - 3).tolist()) == b"</s>"
    assert TOKENIZER("</s>", add_special_tokens=False)["input_ids"] == [TOKENIZER.eos_token_id]
