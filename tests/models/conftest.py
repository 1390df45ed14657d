"""A saved model, and a watch on the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surgery.models.source import make_byte_tokenizer
from tests.families import family

_watched: list[list[str]] = []


def _watch(event: str, _: tuple[object, ...]) -> None:
    if event in ("socket.getaddrinfo", "socket.connect"):
        for events in _watched:
            events.append(event)


sys.addaudithook(_watch)  # cannot be taken off again; it does nothing while nobody watches


@pytest.fixture
def network() -> Iterator[list[str]]:
    """The attempts to reach something over the network while the test runs."""
    events: list[str] = []
    _watched.append(events)
    yield events
    _watched.remove(events)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with its tokenizer, as save_pretrained writes them."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    family("llama", dtype=torch.float32).save_pretrained(directory)
    make_byte_tokenizer().save_pretrained(directory)
    return directory
