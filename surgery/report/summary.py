"""`summary.json`: the run for scripts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("attention-surgery", "torch", "transformers", "pytorch-lightning", "hydra-core",
            "omegaconf", "wandb", "safetensors", "datasets")  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
