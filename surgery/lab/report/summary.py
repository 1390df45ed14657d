"""`summary.json`: the run for scripts. Its schema lies beside it; docs/outputs.md explains it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import torch

FORMAT = 2
SUMMARY = "summary.json"
SCHEMA = "summary.schema.json"
MOMENTS = ("before", "after_surgery", "after_training")
# Nats per token: what surgery opens below this is rounding, and nothing to close.
NO_GAP = 1e-4
# Standard errors that a gap must have for a share of it to be said.
SURE = 2.0
PACKAGES = (
    "attention-surgery",
    "torch",
    "transformers",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "wandb",
    "safetensors",
    "datasets",
)


def compute_gap_closed(figures: dict[str, Any], noise: float | None = None) -> float | None:
    """Share of the loss that surgery opened and training closed again.

    Args:
        noise: standard error of what surgery opened and training closed. If the gap is not
            `SURE` times as large, the share would say nothing, and is ``None``.
    """
    if any(figures.get(moment) is None for moment in MOMENTS):
        return None
    before, opened, healed = (figures[moment]["loss"] for moment in MOMENTS)
    gap = opened - before
    least = max(NO_GAP, SURE * (noise or 0.0))
    return float((opened - healed) / gap) if gap > least else None


def describe_machine() -> dict[str, Any]:
    """What the timings were taken on."""
    return {
        "cpu": _find_cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _find_cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def find_versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_schema() -> str:
    """The JSON Schema of `summary.json`."""
    return files("surgery.lab.report").joinpath(SCHEMA).read_text(encoding="utf-8")
