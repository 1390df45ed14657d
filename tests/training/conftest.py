import datasets
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quick() -> None:
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
