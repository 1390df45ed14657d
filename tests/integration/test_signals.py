"""SIGTERM and Ctrl-C at any stage: a status of their own, one line, nothing in part."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from surgery.cli import main
from surgery.signals import Stopped, raise_on_signals
from tests.lab.dashboard.reading import QUICK, model_and_text

RUN = (
    *(one for one in QUICK if not one.startswith("callbacks.checkpoint")),
    "stages=[plan,measure,calibrate,operate,train,export,report]",
    "attention=[gqa]",
    "attention.gqa.kv_heads=2",
    "attention.gqa.merge=optimal",
    "calibration.refine_steps=1",
    "calibration.joint_steps=2",
    "trainer.enable_progress_bar=true",
    "callbacks.checkpoint.every_n_train_steps=1",
    "logger=csv",
)


class SignalAt(StringIO):
    """Output that sends this process a signal once it has shown certain words."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__()
        self.words, self.number, self.sent = words, number, False

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.words in text and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)
        return written


class StopWhenMade(Callback):
    """A callback of a run that is stopped while it is prepared."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is ignored in what a shell has started in the background, and in its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return model_and_text(tmp_path_factory.mktemp("model"))


@pytest.fixture
def go(model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    def run(run_dir: Path, words: str, number: int, *overrides: str) -> Ended:
        out, err, code = SignalAt(words, number), StringIO(), 0
        arguments = ["train.py", *model, *RUN, f"hydra.run.dir={run_dir}", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert out.sent or not words
        return Ended(code, out.getvalue(), err.getvalue())

    return run


STAGES = {
    "plan": ("Plan for", signal.SIGTERM, "in stage plan"),
    "measure": ("== measure", signal.SIGINT, "in stage measure"),
    "calibrate": ("== calibrate", signal.SIGTERM, "in stage calibrate"),
    "operate": ("== operate", signal.SIGINT, "in stage operate"),
    "before training": ("== train", signal.SIGTERM, "in stage train"),
    "export": ("== export", signal.SIGTERM, "in stage export"),
    "report": ("Result for", signal.SIGINT, "in stage report"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_ends_with_one_line(
    stage: str, go: Callable[..., Ended], tmp_path: Path
) -> None:
    words, number, where = STAGES[stage]
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    ended = go(tmp_path / "run", words, number)
    assert ended.code == 128 + number
    (line,) = [one for one in ended.err.splitlines() if "arning" not in one]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert line.startswith(f"stopped by {name} {where}")
    assert f"what is in {tmp_path / 'run'} is whole" in line
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "run/export").exists() or stage == "report"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_says_how_to_go_on(
    number: signal.Signals, go: Callable[..., Ended], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = go(run_dir, "training: step 3", number)
    assert ended.code == 128 + number
    said = re.search(r"in stage train, after step 3: .*resume=(\S+) goes on", ended.err)
    assert said is not None, ended.err
    assert "Traceback" not in ended.err
    assert torch.load(said[1], weights_only=True)["global_step"] in (2, 3)
    if number == signal.SIGINT:
        return
    again = go(run_dir, "", 0, f"resume={said[1]}")
    assert again.code == 0, again.err
    assert "training: step 5/5" in again.out
    assert "step 2/5" not in again.out
    assert "of an earlier run, until this one writes its own: checkpoints" in again.out


def test_nothing_is_left_where_nothing_was_written(
    go: Callable[..., Ended], tmp_path: Path
) -> None:
    """While the run is prepared."""
    stop = "+callbacks.stop._target_=tests.integration.test_signals.StopWhenMade"
    ended = go(tmp_path / "run", "", 0, stop)
    assert ended.code == 143
    assert ended.err == (
        "stopped by SIGTERM before the first stage: nothing was written; "
        "the same command starts again\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under `nohup`, or in the background of a shell without job control."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raise_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped) as caught:
                os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
