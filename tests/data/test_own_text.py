"""Text that the original says: what is sampled, what it is sampled from, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, TopPLogitsWarper

from surgery.config.schema import Task
from surgery.data.collate import IGNORED
from surgery.data.module import TextData
from surgery.data.openings import Openings, make_openings
from surgery.data.own_text import OwnText
from surgery.data.sampling import Sampling, _draw, sample_windows
from surgery.data.sources import check_source
from surgery.errors import ConfigError
from surgery.models.forward import get_forward_options
from tests.data.making import EOS, data_config, documents, word_tokenizer, write_texts
from tests.tiny_models import VOCAB, tiny_model

TOKENIZER = word_tokenizer(eos_token="</s>", pad_token="<pad>")
CHAT = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
# A third of the vocabulary ends a document, so rows hold many.
ENDS = frozenset(range(2, VOCAB, 3))
GREEDY = Sampling(temperature=1.0, top_p=1.0, greedy_tokens=10**6, ends=ENDS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTENTION_SURGERY_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def own_text(model: PreTrainedModel, tokenizer: Any = TOKENIZER, **fields: Any) -> OwnText:
    named = {"windows", "temperature", "top_p", "greedy_tokens", "prompts", "seed"}
    options = {"windows": 6, "batch_size": 2}
    options |= {name: fields.pop(name) for name in named & set(fields)}
    cfg = data_config("self", **{"self": options, **fields})
    return OwnText(cfg, tokenizer, model.config, Task.causal_lm)


def split_documents(ids: torch.Tensor, positions: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = []
    for row, places in zip(ids.tolist(), positions.tolist(), strict=True):
        for token, place in zip(row, places, strict=True):
            if place == 0:
                found.append([])
            found[-1].append(token)
    return found


# llama: positions that start again; gpt2: learned ones; bloom: ALiBi, counted from the mask;
# mistral: a window that is shorter than the rows.
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral"])
@torch.no_grad()
def test_each_document_goes_on_as_it_would_alone(family: str) -> None:
    """The cache and the documents before it change nothing: the likeliest tokens are the same."""
    model = tiny_model(family, attention="eager")
    openings = Openings("texts", [[5, 9], [7], [11, 12, 13], *([token] for token in range(15, 40))])
    ids, positions = sample_windows(model, openings, GREEDY, rows=5, length=24, seed=3)
    found = split_documents(ids, positions)
    assert ids.dtype == torch.int32
    assert ids.shape == positions.shape == (5, 24)
    assert len(found) > 8, "too few documents begin within a row to show anything"
    checked = 0
    for document in found:
        opening = next(
            list(o) for o in openings.choices if list(o)[: len(document)] == document[: len(o)]
        )
        logits = model(torch.tensor([document]), **get_forward_options(model)).logits[0]
        for place in range(len(opening), len(document)):
            assert document[place] == int(logits[place - 1].argmax())
            assert (document[place] in ENDS) <= (place == len(document) - 1)
            checked += 1
    assert checked > 20


def test_a_seed_gives_the_same_text_and_another_one_another(llama: PreTrainedModel) -> None:
    openings = make_openings("vocabulary", TOKENIZER, VOCAB, 16)
    sampling = Sampling(1.0, 1.0, 4, frozenset({EOS}))
    options: dict[str, Any] = {"rows": 3, "length": 16}
    before = torch.get_rng_state()
    first, second, third = (
        sample_windows(llama, openings, sampling, seed=seed, **options)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_tokens_are_drawn_from_the_models_distribution(temperature: float, top_p: float) -> None:
    logits = torch.linspace(-2, 2, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None] / temperature)
    wanted = torch.softmax(kept[0], dim=-1)
    rows = 40_000
    drawn = _draw(
        logits.expand(rows, -1),
        torch.zeros(rows, dtype=torch.bool),
        Sampling(temperature, top_p, 0, frozenset()),
        torch.Generator().manual_seed(0),
    )
    counted = torch.bincount(torch.tensor(drawn), minlength=9) / rows
    assert not counted[wanted == 0].any()
    # Five standard errors of a share.
    assert ((counted - wanted).abs() <= 5 * (wanted * (1 - wanted) / rows).sqrt()).all()


def test_first_tokens_may_be_the_likeliest(llama: PreTrainedModel) -> None:
    openings = Openings("vocabulary", [[5]])
    ids, _ = sample_windows(
        llama, openings, Sampling(1.0, 1.0, 3, frozenset()), rows=8, length=12, seed=0
    )
    assert (ids[:, :4] == ids[0, :4]).all()
    assert not (ids == ids[0]).all()


@pytest.mark.parametrize("begins", [False, True])
def test_what_documents_begin_with(begins: bool) -> None:
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>", bos_token="<s>", begins=begins)
    special = set(tokenizer.all_special_ids)
    head = [tokenizer.bos_token_id] * begins
    known = make_openings(None, tokenizer, VOCAB - 4, 8)
    wanted = [[*head, token] for token in range(VOCAB - 4) if token not in special]
    assert (known.kind, list(known.choices)) == ("vocabulary", wanted)
    assert list(make_openings("begin", tokenizer, VOCAB, 8).choices) == [[tokenizer.bos_token_id]]
    texts = make_openings(["w1 w2", "w3"], tokenizer, VOCAB, 8)
    assert list(texts.choices) == [[*head, 6, 7], [*head, 8]]


def test_a_conversation_is_as_its_template_writes_it(llama: PreTrainedModel) -> None:
    """Complete documents are those that the template makes of the same words."""
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT.replace("assistant", "w2").replace(
        "m.role", "'w1' if loop.first else 'w2'"
    )
    openings = make_openings(None, tokenizer, VOCAB, 40)
    assert openings.kind == "chat"
    ids, positions = sample_windows(
        llama, openings, Sampling(1.0, 1.0, 0, frozenset({EOS})), rows=8, length=60, seed=0
    )
    whole = [d for d in split_documents(ids, positions) if d.count(EOS) == 2]
    assert whole
    for document in whole:
        first, second = (i for i, token in enumerate(document) if token == EOS)
        said = tokenizer.decode(document[2:first])
        answered = tokenizer.decode(document[first + 3 : second])
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False)
        assert document == tokenizer(wanted, add_special_tokens=False)["input_ids"]


def test_what_is_kept_is_not_sampled_again(llama: PreTrainedModel, cache: Path) -> None:
    calls: list[int] = []
    handle = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        first = own_text(llama).load_rows(llama)
        assert calls
        calls.clear()
        again = own_text(llama).load_rows(llama)
        assert not calls
        # A smaller number of windows is a part of it, a larger one goes on.
        fewer = own_text(llama, windows=3, val_fraction=0.0).load_rows(llama)[0]
        assert not calls
        more = own_text(llama, windows=8, val_fraction=0.0).load_rows(llama)[0]
        assert len(calls) == 7  # one more shard of two rows: a call per token but the last
    finally:
        handle.remove()
    assert [half[:] for half in first] == [half[:] for half in again]
    assert fewer[:] == first[0][:3]
    assert more[:5] == first[0][:5]
    assert len(list(cache.rglob("*.safetensors"))) == 4
    assert not list(cache.rglob("*.partial"))


def test_a_run_that_was_ended_goes_on(
    llama: PreTrainedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = own_text(llama, val_fraction=0.0).load_rows(llama)[0][:]
    files = sorted(cache.rglob("*.safetensors"))
    contents = [file.read_bytes() for file in files]
    files[1].unlink()
    files[2].write_bytes(contents[2][:-5])  # and one that something has damaged
    monkeypatch.setattr(llama, "forward", _stop_after(llama.forward, 9))
    with pytest.raises(KeyboardInterrupt):
        own_text(llama, val_fraction=0.0).load_rows(llama)
    monkeypatch.undo()
    monkeypatch.setenv("ATTENTION_SURGERY_CACHE", str(cache))
    assert files[1].read_bytes() == contents[1]
    assert own_text(llama, val_fraction=0.0).load_rows(llama)[0][:] == whole
    assert [file.read_bytes() for file in files] == contents


def _stop_after(forward: Any, calls: int) -> Any:
    import functools

    left = [calls]

    @functools.wraps(forward)
    def stopping(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    return stopping


def test_other_options_or_another_model_are_other_samples(
    llama: PreTrainedModel, cache: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"greedy_tokens": 0},
        {"prompts": "begin"},
        {"prompts": ["w1"]},
        {"seq_len": 9},
    ]
    for count, change in enumerate(changes, start=1):
        own_text(llama, windows=2, **change).load_rows(llama)
        assert len(list(cache.rglob("about.json"))) == count, change
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight[0, 0] += 1e-3
    own_text(other, windows=2).load_rows(other)
    other.config.rms_norm_eps *= 2
    own_text(other, windows=2).load_rows(other)
    own_text(other, word_tokenizer(eos_token="<s>", pad_token="<pad>"), windows=2).load_rows(other)
    assert len(list(cache.rglob("about.json"))) == len(changes) + 3


def test_windows_are_split_exactly(llama: PreTrainedModel) -> None:
    for fraction, held_out in ((0.0, 0), (0.01, 1), (0.5, 3), (0.9, 5)):
        own = own_text(llama, val_fraction=fraction)
        train, rest = own.load_rows(llama)
        assert (len(train), len(rest)) == (own.train, own.held_out) == (6 - held_out, held_out)
        assert len({tuple(row) for half in (train, rest) for row in half["input_ids"]}) == 6


def _data(model: PreTrainedModel, **fields: Any) -> TextData:
    own = own_text(model, **fields)
    return TextData(own.cfg, TOKENIZER, Task.causal_lm, seed=0, own=own)


@pytest.mark.parametrize("isolated", [True, False])
def test_batches_are_whole_windows(llama: PreTrainedModel, isolated: bool) -> None:
    data = _data(llama, isolate_documents=isolated, val_fraction=0.3)
    data.check_training()
    assert (data.count_training_rows(), data.count_held_out_rows()) == (4, 2)
    data.sample(llama)
    (batch,) = data.draw_importance_batches(4, 4)
    assert batch["input_ids"].shape == (4, 8)
    learnt = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert torch.equal(~learnt, batch["position_ids"] == 0 if isolated else torch.zeros(4, 8) > 0)
    assert ("position_ids" in batch) is isolated
    assert "attention_mask" not in batch
    assert sum(len(b["input_ids"]) for b in data.load_held_out_batches(9, 2)) == 2
    assert len(list(data.train_dataloader())) == 2
    assert data.measures_itself
    assert "temperature 1" in data.describe()


def test_losses_may_be_on_real_text(llama: PreTrainedModel, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "real.jsonl", documents(40))
    data = _data(llama, val_path=texts)
    real = TextData(data_config(path=texts, val_path=texts), TOKENIZER, Task.causal_lm, seed=0)
    assert data.count_training_rows() == 6
    assert data.count_held_out_rows() == real.held_out_size  # before anything is sampled
    data.sample(llama)
    ours, theirs = (list(d.load_held_out_batches(99, 4)) for d in (data, real))
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine["input_ids"], other["input_ids"])
    assert not data.measures_itself
    assert texts in data.describe()


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"layout": "padded"}, "data.layout"),
        ({"seq_len": 65}, "data.seq_len"),
        ({"val_fraction": 1.0}, "data.val_fraction"),
        ({"prompts": "chat"}, "data.self.prompts"),
        ({"prompts": "nonsense"}, "data.self.prompts"),
        ({"prompts": []}, "data.self.prompts"),
        ({"prompts": ["w1", 3]}, "data.self.prompts"),
        ({"prompts": ["w1 w2 w3 w4 w5 w6 w7 w8"]}, "data.self.prompts"),
    ],
)
def test_what_cannot_be_sampled(llama: PreTrainedModel, fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own_text(llama, **fields)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"path": "x.txt"}, "data.path"),
        ({"val_path": "x.txt"}, "data.val_path"),
        ({"part": "code"}, "data.part"),
        ({"streaming": "always"}, "data.streaming"),
        ({"loss_on": "assistant"}, "data.loss_on"),
        ({"completion_column": "x"}, "data.completion_column"),
        ({"sample_by": "word"}, "data.sample_by"),
        ({"self": None}, "data.self"),
    ],
)
def test_keys_that_samples_do_not_use(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_source(data_config("self", **fields))
    assert caught.value.key == key


@pytest.mark.parametrize("task", [Task.masked_lm, Task.sequence_classification])
def test_other_tasks_and_random_weights_are_refused(llama: PreTrainedModel, task: Task) -> None:
    cfg = data_config("self")
    with pytest.raises(ConfigError, match="causal") as caught:
        OwnText(cfg, TOKENIZER, llama.config, task)
    assert (caught.value.key, caught.value.given) == ("data", "self")
    with pytest.raises(ConfigError, match="random weights") as caught:
        OwnText(cfg, TOKENIZER, llama.config, Task.causal_lm, scratch=True)
    assert caught.value.key == "data"


def test_logits_that_are_no_numbers(llama: PreTrainedModel) -> None:
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ConfigError, match="not all numbers"):
        own_text(broken).load_rows(broken)
