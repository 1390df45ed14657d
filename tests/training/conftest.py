from collections.abc import Iterator

import datasets
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are quickest on one thread; later tests get their own number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
