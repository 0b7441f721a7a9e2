"""The bulk path: tensors to and from a store, without copies of their bytes on this side.

`redisai.Client`, which is for scripts and control, joins a command into one string before it sends
it, and cuts a reply out of what it received; for a model's parameters, that takes longer than the
wire. Here the array's own memory goes to the socket, and what comes is received into the array that
the caller gets or gave. One connection, for one thread at a time; `push_all` and `execute_all` send
several commands ahead of the replies, so that they take one round trip.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fault.errors import InputError, MayflyError, StoreError, StoreUnavailable
from p2p.aggregate.address import StoreAddress

Array = npt.NDArray[Any]
T = TypeVar("T")
Reply = int | bytes | str | None | list[Any]

DTYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "bool": "BOOL",
}
"""RedisAI's names of the dtypes that a tensor can have."""
NUMPY_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
BUFFER_BYTES = 1 << 16
MOST_PARTS = 512
"""Buffers in one system call; Linux takes 1024."""
PASSING = ("LOADING ", "BUSY ", "TRYAGAIN ", "MASTERDOWN ", "CLUSTERDOWN ")
"""How a reply begins that says: later."""
LOST = ("tensor key is empty", "script key is empty")


class StoreLost(StoreError):
    """A tensor or a script that a command names is not in the store."""


class BulkConnection:
    """To the store at a `StoreAddress`.

    Raises StoreUnavailable when nobody answers there, or the connection breaks: then it is closed,
    the next command connects anew, and whether the last one was executed is unknown.
    """

    def __init__(self, url: str, password: str = "", timeout_s: float = 60.0) -> None:
        self._address = StoreAddress.parse(url)
        self._password = password or self._address.password
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._received = bytearray()

    def __enter__(self) -> BulkConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._received.clear()

    def push(self, key: str, array: Array) -> None:
        """Stores the array, of any shape and a dtype of `DTYPES`, under the key.

        Raises InputError for another dtype, StoreError when the store refuses it.
        """
        self.push_all([(key, array)])

    def push_all(self, arrays: Sequence[tuple[str, Array]]) -> None:
        """As `push` for each, in one round trip."""
        commands = [_set_command(key, array) for key, array in arrays]
        self._exchange([part for command in commands for part in command], len(commands))

    def pull(self, key: str, into: Array | None = None) -> Array:
        """The tensor under the key: in a new array, or in `into`, whose shape and dtype it has.

        Raises StoreError when there is none, InputError when `into` is unlike it.
        """

        def receive() -> Array:
            line = self._line()
            if line[:1] == b"-":
                raise self._refusal(line[1:])
            _, dtype, _, shape, _ = [self._read() for _ in range(5)]
            array = _room_for(dtype.decode(), tuple(shape), into)
            self._read_blob(array)
            if array is None:
                raise InputError(f"the tensor {key} is {dtype.decode()} {shape}, unlike its array")
            return array

        self._send(_command("AI.TENSORGET", key, "META", "BLOB"))
        return self._guarded(receive)

    def execute(self, *words: str | bytes | int) -> Reply:
        """One command and its reply. Raises StoreError for an error."""
        (reply,) = self._exchange([*_command(*words)], 1)
        return reply

    def items(self, *words: str | bytes | int) -> list[Any]:
        """As `execute`, for a command that is answered with a list, or None for an empty one."""
        reply = self.execute(*words)
        if reply is not None and not isinstance(reply, list):
            self.close()
            raise StoreUnavailable(f"the store at {self.where} answers {words[0]!r} with no list")
        return reply or []

    def execute_all(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Reply]:
        """Several commands in one round trip. Raises the first StoreError."""
        parts = [part for command in commands for part in _command(*command)]
        return self._exchange(parts, len(commands))

    def _exchange(self, parts: Sequence[bytes | memoryview], replies: int) -> list[Reply]:
        def receive() -> list[Reply]:
            found = [self._read() for _ in range(replies)]
            for reply in found:
                if isinstance(reply, MayflyError):
                    raise reply
            return found

        self._send(parts)
        return self._guarded(receive)

    def _guarded(self, receive: Callable[[], T]) -> T:
        try:
            return receive()
        except (OSError, ValueError) as error:  # it hung up, or says what is no reply
            self.close()
            raise StoreUnavailable(f"the store at {self.where} does not answer: {error}") from None

    @property
    def where(self) -> str:
        """The address, without the password."""
        return str(self._address)

    # ---------------------------------------------------------------- sending

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Gathered by the kernel from where they are, as many at once as it takes."""

        def send() -> None:
            connection = self._connected()
            waiting = [memoryview(part).cast("B") for part in parts if len(part)]
            while waiting:
                sent = connection.sendmsg(waiting[:MOST_PARTS])
                while waiting and sent >= len(waiting[0]):
                    sent -= len(waiting.pop(0))
                if sent:
                    waiting[0] = waiting[0][sent:]

        self._guarded(send)

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        self._received.clear()
        endpoint = self._address.endpoint
        if isinstance(endpoint, str):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(self._timeout_s)
            connection.connect(endpoint)
        else:
            connection = socket.create_connection(endpoint, self._timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        if self._password:
            user = [self._address.user] if self._address.user else []
            self._first(connection, "AUTH", *user, self._password)
        if self._address.database:
            self._first(connection, "SELECT", self._address.database)
        return connection

    def _first(self, connection: socket.socket, *words: str | int) -> None:
        """What comes before all other commands. Raises StoreUnavailable if it is refused."""
        connection.sendall(b"".join(_command(*words)))
        reply = self._read()
        if isinstance(reply, MayflyError):
            self.close()
            raise StoreUnavailable(f"{reply} ({words[0]})")

    # ---------------------------------------------------------------- receiving

    def _read(self) -> Any:
        """A whole reply; an error is returned, and not raised, so that the next can be read."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return self._refusal(rest)
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return self._bulk(int(rest))
        if kind == b"*":
            return None if rest == b"-1" else [self._read() for _ in range(int(rest))]
        raise ConnectionError(f"it says {line[:40]!r}, which is no reply")

    def _refusal(self, words: bytes) -> MayflyError:
        text = words.decode("utf-8", "replace").removeprefix("ERR ")
        told = f"the store at {self.where}: {text}"
        if text.startswith(PASSING):
            return StoreUnavailable(told)
        if text.startswith("NOAUTH"):
            return StoreError(f"{told} Write its address as redis://:PASSWORD@HOST:PORT")
        return StoreLost(told) if any(words in text for words in LOST) else StoreError(told)

    def _bulk(self, length: int) -> bytes | None:
        if length < 0:
            return None
        value = bytearray(length)
        self._receive_into(memoryview(value))
        self._line()
        return bytes(value)

    def _read_blob(self, array: Array | None) -> None:
        """A bulk reply into the array, which is as long; or away."""
        length = int(self._line()[1:])
        self._receive_into(memoryview(bytearray(length)) if array is None else _bytes_of(array))
        self._line()

    def _line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            self._more()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    def _more(self) -> None:
        connection = self._socket
        assert connection is not None
        received = connection.recv(BUFFER_BYTES)
        if not received:
            raise ConnectionError("it closed the connection")
        self._received += received

    def _receive_into(self, room: memoryview) -> None:
        connection = self._socket
        assert connection is not None
        ready = min(len(room), len(self._received))
        room[:ready] = self._received[:ready]
        del self._received[:ready]
        while ready < len(room):
            count = connection.recv_into(room[ready:])
            if not count:
                raise ConnectionError("it closed the connection")
            ready += count


def _command(*words: str | bytes | int) -> list[bytes]:
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    lines = [b"*%d\r\n" % len(encoded)]
    lines += [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded]
    return [b"".join(lines)]


def _set_command(key: str, array: Array) -> list[bytes | memoryview]:
    dtype = DTYPES.get(array.dtype.name)
    if dtype is None or not array.dtype.isnative:
        raise InputError(f"a tensor of {array.dtype} cannot be stored: {', '.join(DTYPES)} can")
    words = [b"AI.TENSORSET", key.encode(), dtype.encode(), *[b"%d" % dim for dim in array.shape]]
    words.append(b"BLOB")
    head = b"".join(
        [b"*%d\r\n" % (len(words) + 1), *[b"$%d\r\n%s\r\n" % (len(w), w) for w in words]]
    )
    raw = _bytes_of(np.ascontiguousarray(array))
    return [head + b"$%d\r\n" % array.nbytes, raw, b"\r\n"]


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _room_for(dtype: str, shape: tuple[int, ...], into: Array | None) -> Array | None:
    """The array to receive into; None if the given one is unlike the tensor."""
    if dtype not in NUMPY_NAMES:
        return None
    wanted = np.dtype(NUMPY_NAMES[dtype])
    if into is None:
        return np.empty(shape, wanted)
    fits = into.dtype == wanted and into.shape == shape and into.flags.c_contiguous
    return into if fits else None
