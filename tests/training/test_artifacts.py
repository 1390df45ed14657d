"""What identifies weights, and what a run is compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.lab.report.comparable import flatten_summary
from surgery.training.identity import compute_fingerprint

MIB = 1 << 20


def _weights(folder: Path, size: int, **changed: int) -> Path:
    """A file of zeros, with other bytes at some places; written sparsely."""
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
        for place in changed.values():
            file.seek(place)
            file.write(b"x")
    return folder


@pytest.mark.parametrize("size", [10, MIB + 1, 70 * MIB])
def test_the_same_weights_have_one_fingerprint_wherever_they_lie(tmp_path: Path, size: int) -> None:
    one, same = (_weights(tmp_path / name, size, at=3) for name in ("a", "b"))
    (same / "README.md").write_text("not weights")
    assert compute_fingerprint(one) == compute_fingerprint(same)
    others = {
        compute_fingerprint(_weights(tmp_path / "c", size)),  # in the header
        compute_fingerprint(_weights(tmp_path / "d", size, at=3, end=size - 1)),
        compute_fingerprint(_weights(tmp_path / "e", size + 1, at=3)),
        compute_fingerprint(_weights(tmp_path / "f", size, at=4)),
    }
    assert len(others | {compute_fingerprint(one)}) == 5


def test_a_file_of_another_name_is_another_model(tmp_path: Path) -> None:
    one, other = _weights(tmp_path / "a", 9), _weights(tmp_path / "b", 9)
    (other / "model.safetensors").rename(other / "adapter.safetensors")
    assert compute_fingerprint(one) != compute_fingerprint(other)


SIZES = {"parameters": 100, "kv_bytes_per_token": 64, "attention_flops": 1000}
FIGURES = SIZES | {"prefill_ms": 1.0, "decode_ms": None}
MOMENTS = ("before", "after_surgery", "after_training")


def _summary(losses: dict[str, float | None], **more: Any) -> dict[str, Any]:
    figures = {
        moment: None if losses.get(moment) is None else FIGURES | {"loss": losses[moment]}
        for moment in MOMENTS
    }
    planned = {"before": SIZES, "after": SIZES | {"kv_bytes_per_token": 16}}
    return {"operations": [], "planned": planned, "gap_closed": None, **figures} | more


@given(st.fixed_dictionaries({m: st.none() | st.floats(0.1, 9) for m in MOMENTS}))
def test_the_loss_is_that_of_the_last_moment_measured(losses: dict[str, float | None]) -> None:
    found = flatten_summary(_summary(losses))
    measured = [loss for moment in MOMENTS if (loss := losses[moment]) is not None]
    assert found.get("result/loss") == (measured[-1] if measured else None)
    assert {k: v for k, v in found.items() if k.startswith("result/loss_")} == {
        f"result/loss_{moment}": loss for moment, loss in losses.items() if loss is not None
    }
    # Without a measurement, sizes are those that the plan foresees.
    assert found["result/kv_bytes_per_token"] == (64 if measured else 16)
    assert found["result/kv_bytes_share"] == 0.25
    assert found["operations"] == "none"
    assert None not in found.values()


def test_training_and_alarms_are_counted() -> None:
    training = {"steps": 7, "tokens": 70, "alarms": [{"alarm": "dead"}, {"alarm": "logits"}]}
    operations = [{"operation": "gqa"}, {"operation": "rope"}]
    export = {"format": "native"}
    found = flatten_summary(
        _summary({}, training=training, operations=operations, export=export, gap_closed=0.5)
    )
    assert (found["result/steps"], found["result/tokens"], found["result/alarms"]) == (7, 70, 2)
    assert (found["operations"], found["export"]) == ("gqa, rope", "native")
    assert found["result/gap_closed"] == 0.5
    assert flatten_summary(_summary({}, training={"steps": 1, "alarms": []}))["result/alarms"] == 0


def test_weights_of_other_kinds_have_a_fingerprint_too(tmp_path: Path) -> None:
    one, other = _weights(tmp_path / "a", 9), _weights(tmp_path / "b", 9, at=3)
    for folder in (one, other):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        (folder / "training_args.bin").write_text(folder.name)
    assert compute_fingerprint(one) != compute_fingerprint(other)
    files = [folder / "pytorch_model.bin" for folder in (one, other)]
    assert [compute_fingerprint(file) for file in files] == [
        compute_fingerprint(folder) for folder in (one, other)
    ]
