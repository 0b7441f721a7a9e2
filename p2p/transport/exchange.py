"""The part of a relay that hands on what is large, over connections of our own (`stream.py`).

A peer's header begins with the destination's name, and arrives with the source's: a byte with its
length, the name, the header itself. Messages are received whole and then queued for their
destination, at most `queue_bytes` of them, half of that from one source; what does not fit is
dropped and counted. So nobody waits for another.

A destination that has no such connection is reached by the relay's other way.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import zmq

from p2p.transport.stream import Address, Broken, Connection, Entrance
from p2p.transport.wire import Frame, Malformed

BATCH_MESSAGES = 16
UNIX_SUFFIX = ".large"
"""Of the relay's own Unix socket's name."""


class Counters(Protocol):
    messages: int
    bytes: int
    dropped: int


class Addressed(NamedTuple):
    """A message with whom it is for, or from."""

    name: bytes
    header: bytes
    payload: memoryview


def addressed(name: bytes, header: Frame) -> bytes:
    return b"".join((bytes([len(name)]), name, header))


def opened(frames: list[Frame]) -> tuple[Addressed, memoryview]:
    """What `addressed` has closed, and where its payload comes. Raises Malformed."""
    if len(frames) != 2 or not len(frames[0]) > frames[0][0]:
        raise Malformed("a large message without an address")
    header, payload = bytes(frames[0]), memoryview(frames[1])
    end = 1 + header[0]
    return Addressed(header[1:end], header[end:], payload), payload


class Room:
    """What is held for one destination, in bytes."""

    def __init__(self) -> None:
        self._bytes = 0
        self._bytes_of: Counter[bytes] = Counter()

    def is_enough(self, source: bytes, size: int, limit: int) -> bool:
        """A message finds room where there is nothing else, however large it is; otherwise one
        source may have half of the limit."""
        if not self._bytes:
            return True
        return self._bytes + size <= limit and self._bytes_of[source] + size <= limit // 2

    def take(self, source: bytes, size: int) -> None:
        self._bytes += size
        self._bytes_of[source] += size

    def give_back(self, source: bytes, size: int) -> None:
        self._bytes -= size
        self._bytes_of[source] -= size
        if not self._bytes_of[source]:
            del self._bytes_of[source]


@dataclass(slots=True)
class _Queue:
    """What waits for one connection, the oldest first."""

    connection: Connection[Addressed]
    room: Room = field(default_factory=Room)
    entries: deque[tuple[bytes, Sequence[Frame], int]] = field(default_factory=deque)

    def add(self, source: bytes, frames: Sequence[Frame], size: int) -> None:
        self.entries.append((source, frames, size))
        self.room.take(source, size)

    def feed(self) -> None:
        """Hands on what the connection takes now. Raises Broken."""
        self.connection.flush()
        while self.entries and self.connection.is_idle:
            source, frames, size = self.entries.popleft()
            self.room.give_back(source, size)
            self.connection.send(frames)


class Exchange:
    """Whoever was invited speaks with the others. Owned by one thread.

    `elsewhere` takes a message (source, destination, header, payload) for a destination that is not
    here. Raises OSError when it cannot listen at the addresses.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        poller: zmq.Poller,
        seals: bool,
        queue_bytes: int,
        counters: Counters,
        elsewhere: Callable[[bytes, bytes, bytes, memoryview], None],
    ) -> None:
        self.entrance: Entrance[Addressed] = Entrance(addresses, poller, seals, opened)
        self._queue_bytes = queue_bytes
        self._counters = counters
        self._elsewhere = elsewhere
        self._queues: dict[bytes, _Queue] = {}

    def serve(self, descriptor: int) -> None:
        """Something happened at a descriptor of the poller's that is no other's."""
        connection = self.entrance.connections.get(descriptor)
        if connection is None:
            self.entrance.accept()
            return
        # in batches, so that a flood does not keep the others waiting
        for _ in range(BATCH_MESSAGES):
            try:
                message = self.entrance.receive(connection)
            except Malformed:
                self._counters.dropped += 1
                return
            if message is None:
                break
            self._forward(connection.name, message)
        queue = self._queues.get(connection.name)
        if queue is not None and queue.connection is connection:
            self._feed(queue)

    def tick(self) -> None:
        self.entrance.tick(time.monotonic())
        names = {each.name for each in self.entrance.connections.values()}
        for name in [name for name in self._queues if name not in names]:
            self._drop(self._queues[name])

    def _forward(self, source: bytes, message: Addressed) -> None:
        destination = self.entrance.named.get(message.name)
        if destination is None:
            self._elsewhere(source, *message)
            return
        queue = self._queues.get(message.name)
        if queue is None or queue.connection is not destination:
            if queue is not None:
                self._drop(queue)
            queue = self._queues[message.name] = _Queue(destination)
        size = len(message.header) + len(message.payload)
        if not queue.room.is_enough(source, size, self._queue_bytes):
            self._counters.dropped += 1
            return
        self._counters.messages += 1
        self._counters.bytes += size
        queue.add(source, [addressed(source, message.header), message.payload], size)
        self._feed(queue)

    def _feed(self, queue: _Queue) -> None:
        try:
            queue.feed()
        except Broken:
            self.entrance.end(queue.connection)
            self._drop(queue)

    def _drop(self, queue: _Queue) -> None:
        self._counters.dropped += len(queue.entries)
        self._queues = {name: each for name, each in self._queues.items() if each is not queue}
