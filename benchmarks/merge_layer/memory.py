"""What a process takes, and what statistics take in it."""

from __future__ import annotations

import torch


def peak() -> int:
    """The most that this process had in memory so far (VmHWM), in bytes."""
    return _status("VmHWM")


def resident() -> int:
    """What it has now (VmRSS), in bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def kept_bytes(statistics: object) -> int:
    """Bytes of the tensors that an object keeps as running sums."""
    found = 0
    for value in vars(statistics).values():
        for one in value.values() if isinstance(value, dict) else [value]:
            found += one.nbytes if isinstance(one, torch.Tensor) else 0
    return found
