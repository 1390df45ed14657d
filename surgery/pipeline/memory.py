"""The most memory that each stage takes, also of stages that lie within one another."""

from __future__ import annotations

import torch

Peaks = dict[str, int | None]
# Written to /proc/self/clear_refs: VmHWM starts anew from what the process has now (proc(5)).
_RESET = "5"


class MemoryWatch:
    """Peaks of the process and of the GPUs, each from a `begin` to its `end`; they may be nested.

    `process` is resident memory in bytes, ``None`` where the system does not tell it by stage
    (Linux does); `gpu` is what torch allocated on all GPUs, ``None`` where none is in use.
    """

    def __init__(self) -> None:
        self._open: list[Peaks] = []
        self._resets = False

    def begin(self) -> None:
        self._note()
        self._open.append({"process": None, "gpu": None})

    def end(self) -> Peaks:
        self._note()
        peaks = self._open.pop()
        if self._open:
            self._open[-1] = merge_peaks(self._open[-1], peaks)
        return peaks

    def _note(self) -> None:
        """Add the peaks so far to the innermost stage, and start new ones."""
        if self._open:
            process = _read_high_water() if self._resets else None
            found: Peaks = {"process": process, "gpu": _read_gpu_peak()}
            self._open[-1] = merge_peaks(self._open[-1], found)
        self._resets = _reset_high_water()
        _reset_gpu_peak()


def merge_peaks(one: Peaks, other: Peaks) -> Peaks:
    """Take the larger of each; ``None`` where neither is known."""
    return {name: max(one[name] or 0, other[name] or 0) or None for name in one}


def _reset_high_water() -> bool:
    """Start the process's peak anew; ``False`` where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(_RESET)
    except OSError:
        return False
    return True


def _read_high_water() -> int | None:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _reset_gpu_peak() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _read_gpu_peak() -> int | None:
    if not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
