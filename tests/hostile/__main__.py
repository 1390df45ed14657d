"""Try thousands of generated inputs, each bounded in time and memory: `make fuzz`.

    python -m tests.hostile --examples 5000 --seed 0

Child processes try them; the parent counts what each ended in, and sees a hang or a signal, which
no test in the same process would survive. Exits with 1 if anything but a refusal or a success came.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY = 12 << 30  # bytes of address space: libraries alone take a third of it
SECONDS = 90  # for one input, on a busy machine
_START = 600  # for the libraries and what is to be damaged
_BATCH = 1000


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _run_child(options.examples, options.seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    started, seed = time.monotonic(), options.seed
    # What was found so far is told, whatever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_tell_counts(counts, faults, started)))
    while sum(counts.values()) < options.examples:
        left = options.examples - sum(counts.values())
        shown = len(faults)
        _watch_child(min(_BATCH, left), seed, counts, faults)
        seed += 1
        for fault in faults[shown:]:
            print(f"\n{fault}\n")
        print(f"{sum(counts.values())} of {options.examples}, {len(faults)} faults", flush=True)
    return _tell_counts(counts, faults, started)


def _tell_counts(counts: Counter[str], faults: list[str], started: float) -> int:
    print()
    for end, count in sorted(counts.items()):
        print(f"{count:6} {end}")
    refused = sum(count for end, count in counts.items() if end.endswith("refused"))
    accepted = sum(count for end, count in counts.items() if end.endswith("success"))
    print(
        f"{sum(counts.values())} inputs in {time.monotonic() - started:.0f} s: {refused} refused, "
        f"{accepted} accepted, {len(faults)} faults"
    )
    return 1 if faults else 0


def _watch_child(examples: int, seed: int, counts: Counter[str], faults: list[str]) -> None:
    command = [sys.executable, "-m", "tests.hostile", "--child"]
    command += ["--examples", str(examples), "--seed", str(seed)]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        current, hung = "", False
        for line in _read_lines(child):
            if line is None:
                hung = True
                child.kill()
                break
            message = json.loads(line)
            if "begin" in message:
                current = message["begin"]
                continue
            counts[message["end"]] += 1
            if "said" in message:
                faults.append(f"{current}\n{message['said']}")
        status = child.wait()
        if hung or status:
            name = "hang" if hung else f"signal {-status}" if status < 0 else f"status {status}"
            counts[name] += 1
            said.seek(0)
            faults.append(f"{name}: {current}\n{said.read()[-2000:].decode(errors='replace')}")


def _read_lines(child: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Yield what a child says, line by line; ``None`` if it says nothing for too long."""
    assert child.stdout is not None
    rest, patience = b"", _START
    while True:
        if not select.select([child.stdout], [], [], patience)[0]:
            yield None
        patience = SECONDS
        chunk = os.read(child.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _run_child(examples: int, seed: int) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "disabled"
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not the parent's
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_DATASETS_CACHE"] = str(Path(root) / "datasets")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        _try_all(examples, seed, Path(root), out)
    return 0


def _try_all(examples: int, seed: int, root: Path, out: Any) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.hostile.bases import make_bases
    from tests.hostile.cases import Case, make_cases
    from tests.hostile.try_case import SUCCESS, empty, try_case

    bases = make_bases(root)

    def tell(**message: str) -> None:
        out.write(f"{json.dumps(message)}\n")

    @seeded(seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(make_cases())
    def try_one(case: Case) -> None:
        tell(begin=repr(case)[:3000])
        try:
            end = try_case(case, bases, empty(root / "case"))
        except Exception:
            tell(end=f"{case.kind}: fault", said=traceback.format_exc()[-3000:])
        else:
            tell(end=f"{case.kind}: {'success' if end == SUCCESS else 'refused'}")

    try_one()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
