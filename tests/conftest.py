"""What all tests share: none leaves its mark on how the next one imports."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

RUNS = "tests/runs/"


@pytest.fixture(autouse=True)
def own_import_path() -> Iterator[None]:
    """Loading a job puts its folder first in `sys.path`, where some tests have a `chaos.py`."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs of real processes first: at the end, one worker alone would be left with them."""
    items.sort(key=lambda item: not item.nodeid.startswith(RUNS))
