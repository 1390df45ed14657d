"""Sizes that do not follow from heads and windows: planned and measured by the same word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery.config.schema import MeasureConfig, Task
from surgery.measure.measure import measure_model
from surgery.plan.draft import Draft
from surgery.plan.make import make_plan
from surgery.plan.operation import Operation
from surgery.plan.sizes import Sizes
from tests.data.making import VOCAB, documents, text_data, write_texts
from tests.tiny_models import tiny_model


@dataclass
class SmallCache(Operation):
    """Says that what is cached takes half."""

    name = "small_cache"

    def plan(self, draft: Draft) -> None:
        draft.notes.append(self.name)

    def adjust_sizes(self, sizes: Sizes, tokens: int) -> Sizes:
        half = sizes.kv_bytes // 2
        return replace(sizes, kv_bytes=half, kv_bytes_per_token=half / tokens)


def test_measured_sizes_are_the_planned_ones(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    plan = make_plan(model, [SmallCache()], tokens=32, kv_bytes=4)
    assert 2 * plan.sizes_after.kv_bytes == plan.sizes_before.kv_bytes
    data = text_data(write_texts(tmp_path / "text.txt", documents(40)))
    data.setup()
    cfg = MeasureConfig(windows=2, batch_size=2, prefill_tokens=8, decode_tokens=2, repeats=1)
    for operations, planned in (((), plan.sizes_before), ([SmallCache()], plan.sizes_after)):
        found = measure_model(
            model, data, cfg, Task.causal_lm, label="now", tokens=32, operations=operations
        )
        assert found.kv_bytes == planned.kv_bytes
        assert found.kv_bytes_per_token == planned.kv_bytes_per_token
