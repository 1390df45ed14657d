"""Every statistic, under any backend and mask, is what its definition says of the explicit map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from surgery.observe import AttentionCall, Tap, statistics
from surgery.observe.head_sums import HeadSums
from surgery.observe.statistics import MAXIMA, ROOTS, STATISTICS, compute_head_statistics
from tests import families
from tests.observe import reference_flash
from tests.observe.explicit import explicit_maps, recorded_calls
from tests.observe.explicit_statistics import Figures, explicit_statistics
from tests.tiny_models import tiny_model

LENGTH = 12
BY_HAND = {"max_logit", "output_norm"}
ALL = torch.arange(LENGTH)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every test goes example by example, and by a few rows of it, as long texts do."""
    monkeypatch.setattr(statistics, "BLOCK_ROWS", 5)
    monkeypatch.setattr(statistics, "BLOCK_BYTES", {"cpu": 1})


def repeating(batch: int = 3, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Few kinds of tokens, so that they come again; some twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 8, (batch, length), generator=generator)


def padding(side: str, batch: int = 3) -> torch.Tensor:
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    if side == "right":
        mask[0, 5:], mask[2, 11:] = 0, 0
    if side == "left":
        mask[0, :5], mask[2, :1] = 0, 0
    return mask


def beginnings(mask: torch.Tensor) -> torch.Tensor:
    return mask.argmax(-1, keepdim=True).expand(mask.shape)


@torch.no_grad()
def tapped_calls(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    **batch: object,
) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    tap = Tap(model, calls.append)
    tap.open(mask, tokens=ids)
    try:
        model(input_ids=ids, attention_mask=mask, **batch)
    finally:
        tap.close()
    return calls


def assert_equal(
    got: Figures, expected: Figures, nothing: frozenset[str] | set[str] = frozenset()
) -> None:
    """Sums and the number of rows; `nothing` names what has to be left without a row."""
    assert set(expected) | BY_HAND | nothing == set(STATISTICS)
    for name, (total, count) in expected.items():
        torch.testing.assert_close(got[name][1], count.double(), msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(
            got[name][0].float(), total, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in nothing:
        assert not got[name][1].any(), name


CASES = [
    *[(name, "eager") for name in ("gemma2", "gpt2")],
    *[(name, "sdpa") for name in ("llama", "mistral", "bert", "modernbert")],
    *[(name, "flash") for name in ("mistral", "gemma2", "modernbert")],
]


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_real_row(
    name: str, attention: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = repeating(), padding(side)
    given = None if side == "none" else mask
    maps = explicit_maps(tiny_model(name, "eager"), input_ids=ids, attention_mask=given)
    model = tiny_model(name, "eager" if attention == "flash" else attention)
    if attention == "flash":
        reference_flash.install(monkeypatch)
        reference_flash.use_flash(model)
    calls = tapped_calls(model, ids, given)
    assert len(calls) == len(maps) == 2
    for call, explicit in zip(calls, maps, strict=True):
        expected = explicit_statistics(explicit, mask, ids, starts=beginnings(mask))
        assert_equal(compute_head_statistics(call, ALL), expected)


@pytest.mark.parametrize("name", ["qwen3", "phi", "cohere2", "stablelm", "olmo2"])
def test_families(name: str) -> None:
    """Normed queries, partial rotary dimensions, windows in some layers."""
    ids = repeating()
    model = families.family(name, dtype=torch.float32, num_key_value_heads=4)
    model.set_attn_implementation("eager")
    maps = explicit_maps(model, input_ids=ids)
    model.set_attn_implementation("sdpa")
    for call, explicit in zip(tapped_calls(model, ids), maps, strict=True):
        expected = explicit_statistics(explicit, torch.ones_like(ids), ids)
        assert_equal(compute_head_statistics(call, ALL), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex() -> None:
    ids, mask = repeating(), padding("left")
    torch.compiler.set_stance("force_eager")
    try:
        calls = tapped_calls(tiny_model("mistral", "flex_attention").eval(), ids, mask)
        maps = explicit_maps(tiny_model("mistral", "eager"), input_ids=ids, attention_mask=mask)
        for call, explicit in zip(calls, maps, strict=True):
            expected = explicit_statistics(explicit, mask, ids, starts=beginnings(mask))
            assert_equal(compute_head_statistics(call, ALL), expected)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("strength", [-2.0, 2.0, 30.0])
def test_a_sink_is_no_key(strength: float) -> None:
    """Neither in the mean distance nor as the first token; it takes part of the softmax."""
    ids, mask = repeating(), padding("right")
    model = tiny_model("gpt_oss", "eager")
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.linspace(-2, 2, 4) + strength
    maps = explicit_maps(model, input_ids=ids, attention_mask=mask)
    for call, explicit in zip(tapped_calls(model, ids, mask), maps, strict=True):
        expected = explicit_statistics(explicit, mask, ids, sink=True)
        if strength == 30:
            assert (expected["saturation"][0] == expected["saturation"][1]).all()
        assert_equal(compute_head_statistics(call, ALL), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_documents(name: str, attention: str) -> None:
    """First tokens are the documents' own, and none is looked for in another document."""
    ids = repeating(1)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.tensor([[0] * 5 + [5] + [6] * 6])
    eager = tiny_model(name, "eager")
    maps = explicit_maps(eager, input_ids=ids, position_ids=positions)
    calls = tapped_calls(tiny_model(name, attention), ids, position_ids=positions, use_cache=False)
    for call, explicit in zip(calls, maps, strict=True):
        expected = explicit_statistics(explicit, torch.ones_like(ids), ids, starts=starts)
        assert_equal(compute_head_statistics(call, ALL), expected)


def test_packed_documents_under_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    reference_flash.install(monkeypatch)
    ids = repeating(2)
    bounds = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    starts = torch.tensor([[0] * 5 + [5] * 7, [0] * 8 + [8] * 4])
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (5, 8)])
    maps = explicit_maps(tiny_model("llama", "eager"), input_ids=ids, position_ids=positions)
    flat = reference_flash.use_flash(tiny_model("llama"))
    calls = tapped_calls(
        flat,
        ids,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=8,
        max_length_k=8,
    )
    for call, explicit in zip(calls, maps, strict=True):
        expected = explicit_statistics(explicit, torch.ones_like(ids), ids, starts=starts)
        assert_equal(compute_head_statistics(call, ALL), expected)


# A static cache of a sliding window keeps its keys in another order.
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "dynamic"), ("llama", "static"), ("mistral", "dynamic")]
)
def test_with_a_cache(name: str, new: int, kind: str) -> None:
    ids, start = repeating(2), LENGTH - new
    maps = explicit_maps(tiny_model(name, "eager"), input_ids=ids)
    model = tiny_model(name)
    cache = (
        StaticCache(config=model.config, max_cache_len=LENGTH)
        if kind == "static"
        else DynamicCache()  # it keeps all keys
    )
    recorded_calls(model, input_ids=ids[:, :start], past_key_values=cache)
    calls: list[AttentionCall] = []
    tap = Tap(model, calls.append)
    tap.open(tokens=ids)
    recorded_calls(model, input_ids=ids[:, start:], past_key_values=cache)
    tap.close()
    for call, explicit in zip(calls, maps, strict=True):
        last = explicit[:, :, start:]
        expected = explicit_statistics(last, torch.ones(2, new), ids)
        if name == "mistral":  # the first token lies outside of the window
            assert "first_token" not in expected
        missing = set(STATISTICS) - BY_HAND - set(expected)
        assert_equal(compute_head_statistics(call, torch.arange(new)), expected, missing)


def test_the_prefill_of_a_cache_with_room_to_spare() -> None:
    ids = repeating(2)
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    maps = explicit_maps(tiny_model("llama", "eager"), input_ids=ids)
    for call, explicit in zip(tapped_calls(model, ids, past_key_values=cache), maps, strict=True):
        assert call.key.shape[2] == 20
        expected = explicit_statistics(explicit, torch.ones_like(ids), None)
        # The ids are not as many as the keys, so which key holds which token is not known.
        assert_equal(compute_head_statistics(call, ALL), expected, {"same_token", "induction"})


def bart(attention: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "bart",
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        dropout=0.0,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    return families.randomised(model, 0, torch.float32)


@pytest.mark.parametrize("build", [lambda a: tiny_model("t5", a), bart], ids=["t5", "bart"])
def test_cross_attention(build: object) -> None:
    """Distances and tokens are those of one text; the first key of the other is its first."""
    ids, mask, targets = repeating(), padding("left"), repeating(length=7, seed=1)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}
    with torch.no_grad():
        output = build("eager")(**batch, output_attentions=True)  # type: ignore[operator]
    model = build("sdpa")  # type: ignore[operator]
    calls: list[AttentionCall] = []
    tap = Tap(model, calls.append)
    tap.open(mask, None, ids, targets)
    with torch.no_grad():
        model(**batch)
    tap.close()
    encoder = list(output.encoder_attentions)
    decoder = [
        m
        for pair in zip(output.decoder_attentions, output.cross_attentions, strict=True)
        for m in pair
    ]
    everyone = torch.ones_like(targets)
    assert [call.cross for call in calls[len(encoder) :]] == [False, True] * 2
    for call, explicit in zip(calls, [*encoder, *decoder], strict=True):
        rows = torch.arange(explicit.shape[2])
        got = compute_head_statistics(call, rows)
        if call.cross:
            expected = explicit_statistics(explicit, everyone, cross=True)
            missing = {"distance", "previous_token", "own_token", "same_token", "induction"}
            assert_equal(got, expected, missing)
        elif explicit.shape[2] == LENGTH:
            assert_equal(got, explicit_statistics(explicit, mask, ids, starts=beginnings(mask)))
        else:
            assert_equal(got, explicit_statistics(explicit, everyone, targets))


def test_largest_logit_and_output() -> None:
    """What no map tells: of real queries, keys that they see, and the heads' own slices."""
    ids, mask = repeating(), padding("left")
    for call in tapped_calls(tiny_model("llama"), ids, mask):
        group = call.query.shape[1] // call.key.shape[1]
        scores = call.query @ call.key.repeat_interleave(group, 1).mT * 8**-0.5
        seen = torch.ones(LENGTH, LENGTH).tril().bool() & mask.bool()[:, None, :]
        seen = (seen & mask.bool()[:, :, None])[:, None]
        got = compute_head_statistics(call, ALL)
        expected = scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
        torch.testing.assert_close(got["max_logit"][0].float(), expected)
        squares = call.output.square().sum(-1)[mask.bool()].sum(0)
        torch.testing.assert_close(got["output_norm"][0].float(), squares)
        assert (got["output_norm"][1] == mask.sum()).all()


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in blocks are all rows at once: of rows, of examples, of both."""
    ids, mask = repeating(5), padding("right", 5)
    call = tapped_calls(tiny_model("mistral"), ids, mask)[0]
    monkeypatch.setattr(statistics, "BLOCK_ROWS", LENGTH)
    monkeypatch.setattr(statistics, "BLOCK_BYTES", {"cpu": 1 << 30})
    assert len(list(statistics._split_blocks(call, ALL))) == 1
    whole = compute_head_statistics(call, ALL)
    for rows, budget in ((3, 1 << 30), (64, 1), (5, 2 * 4 * 4 * 5 * LENGTH)):
        monkeypatch.setattr(statistics, "BLOCK_ROWS", rows)
        monkeypatch.setattr(statistics, "BLOCK_BYTES", {"cpu": budget})
        assert len(list(statistics._split_blocks(call, ALL))) > 1
        for name, (total, count) in compute_head_statistics(call, ALL).items():
            torch.testing.assert_close(total, whole[name][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(count, whole[name][1])


def test_no_block_is_larger_than_a_few_rows_of_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory grows with the number of keys, however many rows are asked for."""
    monkeypatch.undo()
    shape = torch.empty(8, 32, 4096, 0)
    call = AttentionCall(
        "", torch.nn.Identity(), "sdpa", shape, shape, shape, None, {}, shape, None
    )
    for examples, rows in statistics._split_blocks(call, torch.arange(4096)):
        count = examples.stop - examples.start
        assert len(rows) <= 64
        size = count * 32 * len(rows) * 4096 * 4
        assert count == 1 or size <= statistics.BLOCK_BYTES["cpu"]


def test_only_what_is_asked_for() -> None:
    ids = repeating()
    call = tapped_calls(tiny_model("llama"), ids)[0]
    whole = compute_head_statistics(call, ALL)
    for name in STATISTICS:
        alone = compute_head_statistics(call, ALL, (name,))
        assert set(alone) == {name}
        torch.testing.assert_close(alone[name], whole[name])


def test_unknown_tokens_leave_only_what_needs_them() -> None:
    ids = repeating()
    maps = explicit_maps(tiny_model("llama", "eager"), input_ids=ids)
    call = tapped_calls(tiny_model("llama"), ids)[0]
    expected = explicit_statistics(maps[0], torch.ones_like(ids), None)
    for tokens in (None, ids[:, :5], ids[:1]):
        got = compute_head_statistics(replace(call, tokens=tokens), ALL)
        assert_equal(got, expected, {"same_token", "induction"})


def test_one_key_is_no_choice() -> None:
    call = tapped_calls(tiny_model("llama"), repeating(2, 1))[0]
    got = compute_head_statistics(call, torch.arange(1))
    counted = {name for name, (_, count) in got.items() if count.any()}
    assert counted == {"attention_entropy", "max_logit", "output_norm"}
    assert not got["attention_entropy"][0].any()


def test_what_is_not_a_number_is_not_called_zero() -> None:
    call = tapped_calls(tiny_model("llama"), repeating())[0]
    query = call.query.clone()
    query[0, 2, 5] = torch.nan
    sums = HeadSums(STATISTICS, MAXIMA, ROOTS)
    sums.add("x", compute_head_statistics(replace(call, query=query), ALL))
    for name, figure in sums.summarize()["x"].items():
        wrong = figure.isinf() if name == "max_logit" else figure.isnan()
        if name not in ("output_norm", "saturation"):
            assert wrong.tolist() == [False, False, True, False], name


def test_saturation_stops_gradients() -> None:
    """What the threshold stands for: the trace of the softmax's Jacobian."""
    p = torch.tensor([statistics.SATURATED, 1 - statistics.SATURATED])
    jacobian = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), p.log())
    assert jacobian.trace() < 0.02
