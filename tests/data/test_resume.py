"""A resumed run sees exactly the batches that an uninterrupted one would have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.data.module import TextData
from tests.data.making import documents, text_data, write_texts
from tests.data.watching import every_step, watch

KINDS = {
    "whole": {"streaming": "never"},
    "stream": {"streaming": "always", "shuffle_buffer": 7},
}
# Workers ask for batches ahead of time.
WORKERS = {f"{name}-workers": kind | {"num_workers": 1} for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.fixture(params=KINDS | WORKERS)
def any_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return (KINDS | WORKERS)[request.param]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    texts = documents(60)
    halves = {"a": texts[:25], "b": texts[25:45], "held_out": texts[45:]}
    return [write_texts(tmp_path / f"{name}.jsonl", half) for name, half in halves.items()]


def _data(paths: list[str], **fields: Any) -> TextData:
    options = {"seq_len": 10, "batch_size": 4, "val_path": paths[2], **fields}
    return text_data(paths[:2], seed=3, **options)


def _batches_per_epoch(paths: list[str]) -> int:
    return len(list(_data(paths).train_dataloader()))


def test_from_steps_around_every_epoch_border(
    paths: list[str], tmp_path: Path, any_kind: dict[str, Any]
) -> None:
    epoch = _batches_per_epoch(paths)
    assert epoch > 3
    steps = 2 * epoch + 2
    keep = every_step(tmp_path / "kept")
    straight, _ = watch(_data(paths, **any_kind), tmp_path, max_steps=steps, callbacks=[keep])
    assert len(straight.seen) == steps
    # Epochs are shuffled anew.
    assert straight.seen[:epoch] != straight.seen[epoch : 2 * epoch]
    borders = [epoch - 1, epoch, 2 * epoch + 1]
    if "num_workers" not in any_kind:
        borders += [1, epoch + 1, 2 * epoch]
    for step in borders:
        resumed, _ = watch(
            _data(paths, **any_kind),
            tmp_path,
            max_steps=steps,
            resume=tmp_path / "kept" / f"step-{step}.ckpt",
        )
        assert resumed.seen == straight.seen[step:], f"resumed after step {step}"


def test_from_a_run_that_reached_its_last_step(
    paths: list[str], tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Lightning counts the epoch that `max_steps` cut short as done; its windows are not."""
    straight, _ = watch(_data(paths, **kind), tmp_path, max_steps=9)
    first, trainer = watch(_data(paths, **kind), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    second, _ = watch(_data(paths, **kind), tmp_path, max_steps=9, resume=tmp_path / "done.ckpt")
    assert first.seen + second.seen == straight.seen


def test_from_the_end_of_an_epoch(paths: list[str], tmp_path: Path, kind: dict[str, Any]) -> None:
    straight, _ = watch(_data(paths, **kind), tmp_path, max_epochs=3)
    keep = every_step(tmp_path / "kept", every_n_train_steps=None, save_on_train_epoch_end=True)
    first, _ = watch(_data(paths, **kind), tmp_path, max_epochs=1, callbacks=[keep])
    resume = Path(keep.best_model_path)
    second, _ = watch(_data(paths, **kind), tmp_path, max_epochs=3, resume=resume)
    assert first.seen + second.seen == straight.seen


def test_with_gradients_accumulated(paths: list[str], tmp_path: Path, kind: dict[str, Any]) -> None:
    steps = _batches_per_epoch(paths)  # two epochs of batches
    keep = every_step(tmp_path / "kept")
    options = {"accumulate_grad_batches": 2, "max_steps": steps}
    straight, _ = watch(_data(paths, **kind), tmp_path, callbacks=[keep], **options)
    assert straight.batches[steps] > steps + 1
    for step in (1, steps // 2, steps - 1):
        resumed, _ = watch(
            _data(paths, **kind),
            tmp_path,
            **options,
            resume=tmp_path / "kept" / f"step-{step}.ckpt",
        )
        assert resumed.seen == straight.seen[straight.batches[step] :]


def test_with_validation_in_the_middle(
    paths: list[str], tmp_path: Path, kind: dict[str, Any]
) -> None:
    options = {"max_steps": 9, "limit_val_batches": 1, "val_check_interval": 2}
    keep = every_step(
        tmp_path / "kept", every_n_train_steps=None, monitor="val/loss", save_top_k=-1
    )
    straight, _ = watch(_data(paths, **kind), tmp_path, callbacks=[keep], **options)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) >= 3
    for checkpoint in kept[:2]:
        step = int(checkpoint.stem.split("-")[1])
        resumed, _ = watch(_data(paths, **kind), tmp_path, resume=checkpoint, **options)
        assert resumed.seen == straight.seen[step:], checkpoint.name


def test_limited_epochs_go_on_through_the_data(
    paths: list[str], tmp_path: Path, kind: dict[str, Any]
) -> None:
    straight, _ = watch(_data(paths, **kind), tmp_path, max_steps=8)
    limited, _ = watch(_data(paths, **kind), tmp_path, max_steps=8, limit_train_batches=2)
    assert limited.seen == straight.seen


def test_a_second_fit_starts_at_the_beginning(
    paths: list[str], tmp_path: Path, kind: dict[str, Any]
) -> None:
    data = _data(paths, **kind)
    first, trainer = watch(data, tmp_path, max_steps=5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    watch(data, tmp_path, max_steps=7, resume=tmp_path / "five.ckpt")
    again, _ = watch(data, tmp_path, max_steps=5)
    assert again.seen == first.seen


def test_overfitting_repeats_the_same_batches(paths: list[str], tmp_path: Path) -> None:
    seen = watch(_data(paths), tmp_path, max_steps=6, overfit_batches=2)[0].seen
    assert seen == seen[:2] * 3


def test_nothing_is_said_of_data_that_cannot_resume(
    paths: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    _, trainer = watch(_data(paths), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    watch(_data(paths), tmp_path, max_steps=4, resume=tmp_path / "two.ckpt")
    assert not [w for w in recwarn if "resumable" in str(w.message)]
