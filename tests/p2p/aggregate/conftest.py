"""A server of each kind for all tests of a session, and new ones for those that end theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.store_server import StoreServer
from p2p.aggregate.bulk import BulkConnection
from tests.p2p.aggregate.stores import DEBIAN_REDIS, OLDEST, Store, Wire, binary_of

KINDS = ("valkey", "redis", pytest.param(OLDEST, marks=pytest.mark.acceptance))
MEMORY_LIMIT = 1 << 30
"""Bytes, which scripts that want all there is get before they are ended."""


def server_or_skip(kind: str, folder: Path) -> Store:
    """Not yet started."""
    binary = binary_of(kind)
    if binary is None:
        pytest.skip(f"there is no {DEBIAN_REDIS} here")
    return Store(binary, folder, is_old=kind == OLDEST)


@pytest.fixture(scope="session", params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """A server that lives as long as the session."""
    one = server_or_skip(request.param, tmp_path_factory.mktemp(request.param))
    # which older servers allow without being asked
    debug = [] if one.is_old else ["--enable-debug-command", "yes"]
    one.start(*debug, engine=("MEMORY_LIMIT", str(MEMORY_LIMIT)))
    yield one
    one.stop()


@pytest.fixture
def wire(store: Store) -> Iterator[Wire]:
    """A connection to an empty server, which has to be in step and alive afterwards."""
    one = store.connect()
    one("FLUSHALL")
    yield one
    one.close()


@pytest.fixture(params=KINDS)
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    """Servers of this test's own, by name; not yet started."""
    made: list[Store] = []

    def make(name: str) -> Store:
        folder = tmp_path / name
        folder.mkdir()
        made.append(server_or_skip(request.param, folder))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    servers = [StoreServer(tmp_path_factory.mktemp("store")) for _ in range(2)]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def urls(stores: list[StoreServer]) -> list[str]:
    for server in stores:
        with BulkConnection(server.url) as store:
            store.execute("FLUSHALL")
    return [server.url for server in stores]
