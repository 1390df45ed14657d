"""What every test needs: no network, and nothing read from, or left in, the user's own caches."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Read once, when huggingface_hub is imported: later it would still try, for a minute each time.
os.environ["HF_HUB_OFFLINE"] = "1"

# Composing makes cycles by the ten thousand beside the half million objects of the libraries, which
# the usual thresholds look through again and again: a tenth of the whole time.
gc.set_threshold(20_000, 20)

# Files of these have few tests that take long each; last, one process would wait for the other.
FIRST = {"integration", "benchmarks", "packaging"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.isdisjoint(item.path.parts))


@pytest.fixture(autouse=True, scope="session")
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(folder)  # for processes that tests start
    os.environ["ATTENTION_SURGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(folder)
