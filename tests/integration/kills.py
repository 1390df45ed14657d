"""Kill a small run at random moments, and check that what it leaves is whole.

    python -m tests.integration.kills --kills 30 --seed 1
    python -m tests.integration.kills --kills 3 --short      # without the stages that only look

Every run is a fork, so that none waits for imports. Half of them are killed after a random time,
the others just before a random change of a file: there is no third one between two of these. Each
run works in the directory that the one before was killed in; every few kills, and at the end, a run
is left alone, and has to give the same files as one that was never disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgery.cli import main as run_cli
from surgery.files import DRAFT
from surgery.plan.store import load_plan
from tests.lab.dashboard.reading import QUICK, model_and_text

RUN = (
    *(one for one in QUICK if not one.startswith(("callbacks.checkpoint", "trainer.max_steps"))),
    "stages=[plan,measure,score,analyze,calibrate,operate,train,export,report]",
    "attention=[gqa]",
    "attention.gqa.kv_heads=2",
    "attention.gqa.merge=optimal",
    "calibration.refine_steps=1",
    "calibration.joint_steps=2",
    "analysis.windows=2",
    "analysis.batch_size=2",
    "analysis.repeats=2",
    "analysis.repeat_length=8",
    "analysis.probe_texts=8",
    "trainer.max_steps=3",
    "callbacks.checkpoint.every_n_train_steps=1",
    "logger=csv",
)
# What is the same in every run that is not disturbed: the rest holds times.
SAME = ("plan.safetensors", "importance.json", "heads.parquet", "export/config.json")
SHORT = ("stages=[plan,calibrate,operate,train,export]", "trainer.max_steps=2")
UNDISTURBED_EVERY = 10


def kill_runs(kills: int, seed: int, root: Path, *changed: str) -> Counter[str]:
    """Kill that many runs; count what they ended in.

    Args:
        changed: overrides that make the run another one.

    Raises:
        AssertionError: a file is neither whole nor absent, or a later run differs.
    """
    draw = random.Random(seed)
    overrides = (*model_and_text(root), *RUN, *changed)
    reference, run_dir = root / "reference", root / "run"
    sys.argv = ["train.py", *overrides, f"hydra.run.dir={root / 'warm'}"]
    run_cli()  # in this process: forks begin with all that it has imported
    started = time.monotonic()
    events = root / "events"
    assert run_forked(overrides, reference, lambda: _count_changes(reference, events)) == 0
    seconds, changes = time.monotonic() - started, len(events.read_text())
    check_whole(reference, reference)
    print(f"undisturbed: {seconds:.1f} s, {changes} changes of files", flush=True)
    ended: Counter[str] = Counter()
    for number in range(1, kills + 1):
        if number % 2:
            moment = draw.uniform(0, seconds)
            status = run_forked(overrides, run_dir, seconds=moment)
        else:
            change = draw.randint(1, changes)
            status = run_forked(overrides, run_dir, lambda n=change: _die_at(run_dir, n))
        assert status in (0, -signal.SIGKILL), (number, status, (root / "output").read_text())
        found = check_whole(run_dir, reference)
        ended["killed" if status else "done before the kill"] += 1
        ended[f"left {found}"] += 1
        if number % UNDISTURBED_EVERY == 0 or number == kills:
            assert run_forked(overrides, run_dir) == 0, (root / "output").read_text()
            assert check_whole(run_dir, reference) == "a complete run"
            drafts = [path for path in run_dir.rglob("*") if DRAFT in path.name]
            assert not drafts, drafts
            ended["run again, equal to the undisturbed one"] += 1
    return ended


def run_forked(
    overrides: tuple[str, ...],
    run_dir: Path,
    prepare: Callable[[], None] | None = None,
    seconds: float | None = None,
) -> int:
    """Run the command line in a fork; return its status, or minus the signal that ended it.

    Args:
        prepare: called in the fork before it runs.
        seconds: when it is killed.
    """
    process = os.fork()
    if process == 0:
        status = 70
        try:
            output = os.open(run_dir.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            sys.argv = ["train.py", *overrides, f"hydra.run.dir={run_dir}"]
            if prepare is not None:
                prepare()
            run_cli()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _watch_changes(folder: Path, notice: Callable[[], None]) -> None:
    """Call `notice` before this process changes a file below `folder`."""
    below = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and any(below in str(one) for one in arguments[:2]):
            notice()

    sys.addaudithook(hook)


def _count_changes(run_dir: Path, file: Path) -> None:
    count = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _watch_changes(run_dir, lambda: os.write(count, b".") and None)


def _die_at(run_dir: Path, number: int) -> None:
    left = number

    def notice() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch_changes(run_dir, notice)


def check_whole(run_dir: Path, reference: Path) -> str:
    """Check that every file is whole, and say what there is.

    Raises:
        AssertionError: one is not, or differs from that of an undisturbed run.
    """
    if not run_dir.is_dir():
        return "nothing"
    for path in run_dir.rglob("*"):
        named = path.relative_to(run_dir).parts
        if path.is_file() and not any(DRAFT in part for part in named):
            assert not path.name.startswith(("tmp", ".tmp")), path
            _read(path)
    for name in SAME:
        if (run_dir / name).exists() and "heads" not in name:
            assert (run_dir / name).read_bytes() == (reference / name).read_bytes(), name
    if (run_dir / "plan.json").exists():
        plan = load_plan(run_dir)
        closed = (run_dir / "plan.json").read_bytes() == (reference / "plan.json").read_bytes()
        assert closed or plan.open_decisions, "plan.json"  # as it is before calibration
    if (run_dir / "heads.parquet").exists():
        tables = [pq.read_table(one / "heads.parquet") for one in (run_dir, reference)]
        assert tables[0].equals(tables[1])
    if (run_dir / "export").exists():
        check_export(run_dir / "export", reference / "export")
    if not (run_dir / "summary.json").exists():
        return "an incomplete run"
    for path in reference.rglob("*"):  # a summary is the last word, but for the report
        name = path.relative_to(reference)
        if name.name not in ("report.html", "result.png"):
            assert (run_dir / name).exists(), name
    return "a complete run"


def check_export(export: Path, reference: Path) -> None:
    """Check that an export is that of an undisturbed run, and loads."""
    assert {path.name for path in export.iterdir()} == {path.name for path in reference.iterdir()}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (export, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = AutoModelForCausalLM.from_pretrained(export)
    assert torch.isfinite(model(input_ids=torch.arange(3, 11)[None]).logits).all()
    assert model.config.num_key_value_heads == 2


def _read(path: Path) -> None:
    """Read a file to its end, as what its name says that it is."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda p: json.loads(p.read_text()),
        ".yaml": lambda p: yaml.safe_load(p.read_text()),
        ".safetensors": load_file,
        ".parquet": pq.read_table,
        ".png": lambda p: Image.open(p).load(),
        ".ckpt": lambda p: torch.load(p, weights_only=True)["state_dict"],
        ".html": lambda p: p.read_text().rstrip().endswith("</html>") or 1 / 0,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        return
    try:
        reader(path)
    except Exception as error:
        raise AssertionError(f"{path} is not whole: {error!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        changed = SHORT if options.short else ()
        ended = kill_runs(options.kills, options.seed, Path(folder), *changed)
    for what, count in sorted(ended.items()):
        print(f"{count:4}  {what}")


if __name__ == "__main__":
    main()
