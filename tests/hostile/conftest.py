"""The valid input that tests of hostile input damage."""

from __future__ import annotations

import pytest

from tests.hostile.bases import Bases, make_bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))
