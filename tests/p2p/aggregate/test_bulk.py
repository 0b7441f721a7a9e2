"""The bulk path against a real store: what is pushed is pulled, and a break is said."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fault.errors import InputError, StoreError, StoreUnavailable
from launcher.store_server import Endpoint, StoreServer
from p2p.aggregate.bulk import DTYPES, BulkConnection
from p2p.aggregate.storing import ensure_stored, execution

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    server = StoreServer(tmp_path_factory.mktemp("store"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server: StoreServer) -> Iterator[BulkConnection]:
    with BulkConnection(server.url) as connection:
        connection.execute("FLUSHALL")
        yield connection


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (300_000,)])
def test_what_is_pushed_is_pulled(
    store: BulkConnection, dtype: str, shape: tuple[int, ...]
) -> None:
    """Every dtype and shape, into a new array and into a given one, bit for bit."""
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    store.push("x", array)
    pulled = store.pull("x")
    assert pulled.dtype == array.dtype and pulled.shape == shape
    np.testing.assert_array_equal(pulled, array)
    room = np.zeros(shape, dtype)
    assert store.pull("x", room) is room
    np.testing.assert_array_equal(room, array)


def test_an_array_that_lies_elsewhere(store: BulkConnection) -> None:
    """A transposed one is stored as it reads."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    store.push("x", array)
    np.testing.assert_array_equal(store.pull("x"), array)


def test_many_at_once(store: BulkConnection) -> None:
    """More pushes than the kernel gathers at once, in one round trip."""
    arrays = [(f"k{i}", np.full(100, i, np.int32)) for i in range(700)]
    store.push_all(arrays)
    assert all((store.pull(key) == array).all() for key, array in arrays[::97])
    assert store.execute("DBSIZE") == 700


def test_what_cannot_be_is_an_error_and_the_next_command_works(store: BulkConnection) -> None:
    """No key, a key of another kind, an array unlike the tensor, a dtype that no tensor has."""
    with pytest.raises(StoreError, match="tensor key is empty"):
        store.pull("nothing")
    store.execute("SET", "text", "x")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        store.pull("text")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        store.push_all([("a", np.zeros(3)), ("text", np.zeros(3)), ("b", np.zeros(3))])
    assert store.execute("EXISTS", "a", "b") == 2
    for unlike in (np.zeros(4), np.zeros(3, np.float32), np.zeros((3, 1)), np.zeros(6)[::2]):
        with pytest.raises(InputError, match="unlike"):
            store.pull("a", unlike)
    with pytest.raises(InputError, match="float16"):
        store.push("a", np.zeros(3, np.float16))
    np.testing.assert_array_equal(store.pull("a"), np.zeros(3))


def test_several_commands_in_one_round_trip(store: BulkConnection) -> None:
    """Replies of every kind come back in order."""
    replies = store.execute_all(
        [("SET", "a", 1), ("GET", "a"), ("GET", "b"), ("INCR", "a"), ("LRANGE", "l", 0, -1)]
    )
    assert replies == ["OK", b"1", None, 2, []]


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://x", "redis://", "redis://h:port", "unix://", "redis://[::1:7", "redis://h/x"),
        *("redis://:secret@h:99999", "redis://u:secret@[", "redis://u:secret@h?db=2"),
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    """It is an error of the input, before anything is tried, and tells no password."""
    with pytest.raises(InputError) as raised:
        BulkConnection(url)
    assert "secret" not in str(raised.value)


def test_an_address_with_user_and_database(tmp_path: Path) -> None:
    """The user's rights hold, tensors and scripts are in that database, and refusals are clear."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = StoreServer(tmp_path, listen=Endpoint("127.0.0.1", port), password="top")
    server.start()
    where = f"127.0.0.1:{port}"
    try:
        with BulkConnection(f"redis://:top@{where}") as store:
            store.execute("ACL", "SETUSER", "anna", "on", ">secret", "~*", "+@all", "-flushall")
        with BulkConnection(f"redis://anna:secret@{where}/3") as store:
            store.push("x", np.ones(3, np.float32))
            script = ensure_stored(store, "total")
            store.execute(*execution(script, "total", ["x", "x"], ["y"]))
            assert store.pull("y").tolist() == [2, 2, 2]
            with pytest.raises(StoreError, match=f"{where}: NOPERM"):
                store.execute("FLUSHALL")
        with BulkConnection(f"redis://:top@{where}") as store:
            assert store.execute("DBSIZE") == 0
        with (
            BulkConnection(f"redis://{where}") as store,
            pytest.raises(StoreError, match="redis://:P"),
        ):
            store.execute("PING")
        for refused in (f"redis://anna:wrong@{where}", f"redis://:top@{where}/99"):
            with BulkConnection(refused) as store, pytest.raises(StoreUnavailable, match=where):
                store.execute("PING")
    finally:
        server.stop()


def test_a_store_that_goes_and_comes_back(tmp_path: Path) -> None:
    """A kill in the middle of a reply is an error; the same connection finds the next server."""
    server = StoreServer(tmp_path)
    with pytest.raises(StoreUnavailable), BulkConnection(server.url) as store:
        store.execute("PING")
    server.start()
    with BulkConnection(server.url) as store:
        store.push("x", np.zeros(4_000_000, np.float32))
        os.kill(server.pid, signal.SIGSTOP)
        killing = threading.Timer(0.2, os.kill, (server.pid, signal.SIGKILL))
        killing.start()
        with pytest.raises(StoreUnavailable):
            store.pull("x")
        killing.join()
        while server.alive():  # the kernel is still at it
            pass
        server.start()
        assert store.execute("PING") == "PONG"
        server.stop()
