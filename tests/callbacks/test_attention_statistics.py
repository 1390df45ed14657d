"""Logged figures equal those of the explicit map, over the rows that are not padding."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery.callbacks import AttentionStatistics, HeadImportance

from surgery.observe.head_sums import HeadSums
from surgery.observe.statistics import STATISTICS
from tests.callbacks.fitting import Batch, OwnModule, by_layer, fit, padded, unpadded
from tests.observe.explicit import entropies, entropy_of, explicit_maps, recorded_calls
from tests.observe.explicit_statistics import explicit_statistics
from tests.tiny_models import tiny_model, tokens

LENGTH = 10


def seen_entropy(
    module: OwnModule, batches: list[Batch], root: Path, rows: int | None = None, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both metrics [layer, head] of the first step, through Lightning."""
    monitor = AttentionStatistics(every_n_steps=1, heatmap_every_n_steps=1, rows=rows)
    fit(module, batches, [monitor], root, **options)
    return both_metrics(monitor)


def both_metrics(monitor: AttentionStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    entropy, normalized = (
        torch.stack(by_layer(monitor.observations[0], name))
        for name in ("attention_entropy", "normalized_entropy")
    )
    return entropy, normalized


def explicit_entropy(name: str, *batches: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both metrics [layer, head] from the maps of an eager model, over all real rows."""
    per_row, per_row_normalized = [], []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        maps = torch.stack(explicit_maps(tiny_model(name, "eager"), **inputs))
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        entropy = entropy_of(maps).transpose(2, 3)[:, real]  # [layer, row, head]
        keys = (maps[:, :, 0] > 0).sum(-1)[:, real].unsqueeze(-1)
        per_row.append(entropy)
        several = keys[0, :, 0] > 1
        per_row_normalized.append((entropy / keys.log())[:, several])
    return torch.cat(per_row, 1).mean(1).float(), torch.cat(per_row_normalized, 1).mean(1).float()


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.min() > 0.05  # attention is neither one-hot nor, below, uniform
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert got[1].max() < 0.99


@pytest.mark.parametrize("kind", ["unpadded", "padded"])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("bert", "sdpa")]
)
def test_equals_the_explicit_map(name: str, attention: str, kind: str, tmp_path: Path) -> None:
    ids = tokens(3, LENGTH)
    batch = unpadded(ids) if kind == "unpadded" else padded(ids, 10, 4, 7)
    got = seen_entropy(OwnModule(tiny_model(name, attention)), [batch], tmp_path)
    assert_same(got, explicit_entropy(name, batch))


def test_every_figure_is_that_of_all_rows_of_the_step(tmp_path: Path) -> None:
    """Over both micro-batches: means of rows, the largest logit, the root of the mean square."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(3, 7, (3, LENGTH), generator=generator)
    batches = [padded(few, 10, 4, 7), unpadded(few[:2, :8])]
    monitor = AttentionStatistics(1, 1, rows="all")
    model = tiny_model("llama")
    fit(OwnModule(model), batches, [monitor], tmp_path, accumulate_grad_batches=2)
    seen = {name: by_layer(monitor.observations[0], name) for name in STATISTICS}
    assert monitor.metrics == STATISTICS
    real = [batch["labels"] != -100 for batch in batches]
    maps, calls = [], []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        maps.append(explicit_maps(tiny_model("llama", "eager"), **inputs))
        calls.append(recorded_calls(model, **inputs))
    for layer in range(2):
        parts = [
            explicit_statistics(one[layer], mask, batch["input_ids"])
            for one, mask, batch in zip(maps, real, batches, strict=True)
        ]
        for name in parts[0]:
            total, count = (sum(part[name][i] for part in parts) for i in (0, 1))
            torch.testing.assert_close(seen[name][layer], total / count, atol=1e-4, rtol=1e-4)
        here = [(one[layer], mask) for one, mask in zip(calls, real, strict=True)]
        outputs = torch.cat([call.output[mask] for call, mask in here])
        rms = outputs.square().sum(-1).mean(0).sqrt()
        torch.testing.assert_close(seen["output_norm"][layer], rms.detach())
        logits = [
            (call.query @ call.key.repeat_interleave(2, 1).mT * 8**-0.5).transpose(1, 2)[mask]
            for call, mask in here
        ]  # [rows, H, S]
        visible = [
            (torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask[:, None])[mask]
            for _, mask in here
        ]
        tops = [
            x.masked_fill(~v[:, None], -torch.inf).amax((0, 2))
            for x, v in zip(logits, visible, strict=True)
        ]
        top = torch.stack(tops).amax(0).detach()
        torch.testing.assert_close(seen["max_logit"][layer], top)


def test_gradient_accumulation_is_a_mean_over_all_rows(tmp_path: Path) -> None:
    batches = [padded(tokens(3, LENGTH), 10, 2, 2), unpadded(tokens(2, 8, seed=1))]
    module = OwnModule(tiny_model("llama"))
    got = seen_entropy(module, batches, tmp_path, accumulate_grad_batches=2)
    assert_same(got, explicit_entropy("llama", *batches))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_observed_once(
    reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward runs attention once more; that is no second look."""
    added: list[str] = []
    add = HeadSums.add

    def count(sums: HeadSums, site: str, values: Any) -> None:
        added.append(site)
        add(sums, site, values)

    monkeypatch.setattr(HeadSums, "add", count)
    batches = [padded(tokens(3, LENGTH), 10, 2, 2), unpadded(tokens(2, 8, seed=1))]
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    monitor = AttentionStatistics(1, 1, rows=None)
    fit(OwnModule(model), batches, [monitor], tmp_path, accumulate_grad_batches=2)
    assert_same(both_metrics(monitor), explicit_entropy("llama", *batches))
    assert len(added) == 2 * len(batches)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_is_seen_and_stays_compiled(checkpointing: bool, tmp_path: Path) -> None:
    """In observed steps it runs as it was written; between them compiled, with no tap in it."""
    from torch._dynamo.testing import CompileCounter

    steps = [padded(tokens(2, LENGTH, seed=i), 10, 7) for i in range(5)]

    def run(backend: CompileCounter | None) -> AttentionStatistics:
        model = tiny_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers if backend is not None else ():
            layer.compile(backend=backend)
        monitor = AttentionStatistics(2, 2, rows=None)
        fit(OwnModule(model, lr=0.1), steps, [monitor, HeadImportance(2, 2)], tmp_path)
        return monitor

    torch._dynamo.reset()
    compiled = CompileCounter()
    watched, plain = run(compiled), run(None)
    assert compiled.frame_count > 0
    assert [seen["step"] for seen in watched.observations] == [0, 2, 4]
    for got, expected in zip(watched.observations, plain.observations, strict=True):
        torch.testing.assert_close(got["metrics"], expected["metrics"], equal_nan=True)


def test_only_the_metrics_asked_for(tmp_path: Path) -> None:
    """In the table's order; what is not asked for is not there."""
    monitor = AttentionStatistics(1, 1, metrics=["max_logit", "confidence", "attention_entropy"])
    fit(OwnModule(tiny_model("llama")), [unpadded(tokens(2, 6))], [monitor], tmp_path)
    assert list(monitor.observations[0]["metrics"]) == [
        "attention_entropy",
        "max_logit",
        "confidence",
    ]


def test_a_decoder_reads_its_labels_one_place_later(tmp_path: Path) -> None:
    """The tokens that it sees are the labels, shifted, where no others are given."""
    targets = torch.tensor([[5, 6, 5, 7, 5, 6], [4, 4, 4, 4, -100, -100]])
    batch = {"input_ids": tokens(2, 9), "labels": targets}
    start = tiny_model("t5").config.decoder_start_token_id
    shifted = torch.cat([torch.full((2, 1), start), targets[:, :-1].clamp_min(0)], 1)
    monitor = AttentionStatistics(1, 1, rows=None, metrics=["same_token", "induction"])
    fit(OwnModule(tiny_model("t5")), [batch], [monitor], tmp_path)
    with torch.no_grad():
        maps = tiny_model("t5", "eager")(**batch, output_attentions=True).decoder_attentions
    expected = explicit_statistics(maps[0], targets != -100, shifted)
    for name in monitor.metrics:
        layers = by_layer(monitor.observations[0], name)
        total, count = expected[name]
        torch.testing.assert_close(layers[2], total / count, atol=1e-5, rtol=1e-5)
        assert layers[3].isnan().all()  # across


def test_drawn_rows_are_the_same_for_all_heads_and_differ_between_steps(tmp_path: Path) -> None:
    ids = tokens(1, LENGTH)
    maps = torch.stack(explicit_maps(tiny_model("llama", "eager"), input_ids=ids))
    per_row = entropy_of(maps)[:, 0].float()  # [layer, head, row]
    monitor = AttentionStatistics(1, 1, rows=3, seed=5)
    fit(OwnModule(tiny_model("llama")), [unpadded(ids)] * 6, [monitor], tmp_path)
    drawn = set()
    for observation in monitor.observations:
        got = torch.stack(by_layer(observation, "attention_entropy"))
        matching = [
            rows
            for rows in combinations(range(LENGTH), 3)
            if torch.allclose(per_row[:, :, list(rows)].mean(-1), got, atol=1e-5)
        ]
        assert len(matching) == 1  # exactly one draw explains every head of every layer
        drawn.add(matching[0])
    assert len(drawn) > 3

    again = AttentionStatistics(1, 1, rows=3, seed=5)
    fit(OwnModule(tiny_model("llama")), [unpadded(ids)] * 6, [again], tmp_path)
    for one, other in zip(monitor.observations, again.observations, strict=True):
        assert torch.equal(
            one["metrics"]["attention_entropy"], other["metrics"]["attention_entropy"]
        )


def test_mixed_precision_does_not_round_the_logits(tmp_path: Path) -> None:
    """The entropies are those of the run's own queries and keys, in single precision."""
    ids = tokens(2, LENGTH)
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        calls = recorded_calls(model, input_ids=ids, labels=ids)
    assert calls[0].output.dtype == torch.bfloat16  # autocast is at work
    expected = torch.stack([entropies(call).mean((0, 2)) for call in calls])
    got, _ = seen_entropy(OwnModule(model), [unpadded(ids)], tmp_path, precision="bf16-mixed")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_decoder_of_an_encoder_decoder_counts_its_own_queries(tmp_path: Path) -> None:
    ids, targets = tokens(2, 9), tokens(2, 6, seed=1)
    targets[1, 3:] = -100
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": targets}
    with torch.no_grad():
        maps = tiny_model("t5", "eager")(**batch, output_attentions=True)
    expected = [
        entropy_of(layer).transpose(1, 2)[real].mean(0).float()
        for layers, real in [
            (maps.encoder_attentions, mask.bool()),
            # In the order of the module tree: a decoder block attends to itself, then across.
            (
                [
                    m
                    for pair in zip(maps.decoder_attentions, maps.cross_attentions, strict=True)
                    for m in pair
                ],
                targets != -100,
            ),
        ]
        for layer in layers
    ]
    got, _ = seen_entropy(OwnModule(tiny_model("t5")), [batch], tmp_path)
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_masks_of_who_sees_whom_are_no_padding(tmp_path: Path) -> None:
    """A 4-D attention_mask is the model's own business: all rows that see a key count."""
    ids = tokens(2, 6)
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    batch = unpadded(ids) | {"attention_mask": causal}
    got = seen_entropy(OwnModule(tiny_model("llama")), [batch], tmp_path)
    assert_same(got, explicit_entropy("llama", unpadded(ids)))
