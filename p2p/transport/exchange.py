"""The part of a relay that hands on what is large, over connections of our own (`stream.py`).

A peer's header begins with the destination's name, and arrives with the source's: a byte with its
length, the name, the header itself. Messages are received whole and then queued for their
destination, at most `queue_bytes` of them, half of that from one source. What does not fit is held
for `HOLD_S` at most, and nothing more read from its source, as long as the destination takes a
message every `PATIENCE_S`; else it is dropped and counted, so nobody waits for one that does not
read. So for each source there is one message more, held or on its way here.

A destination that has no such connection is reached by the relay's other way.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from p2p.transport.entrance import Entrance
from p2p.transport.stream import Address, Broken, Connection
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, Malformed

BATCH_MESSAGES = 16
PATIENCE_S, HOLD_S = 0.5, 1.5
"""Well below the time after which a source gives a connection up that takes nothing."""
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


def opened(closed: bytes) -> tuple[bytes, bytes]:
    """The name and the header that `addressed` has closed. Raises Malformed."""
    end = 1 + closed[0] if closed else 0
    if not 0 < end <= len(closed):
        raise Malformed("a large message without an address")
    return closed[1:end], closed[end:]


def _begun(header: bytes, size: int | None) -> tuple[Addressed, memoryview]:
    if size is None:
        raise Malformed("a large message without a payload")
    payload = np.empty(size, np.uint8).data
    return Addressed(*opened(header), payload), payload


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
    written: tuple[bytes, int] | None = None
    """Whose the message is that the connection is sending, and its size."""
    held: deque[tuple[Connection[Addressed], Addressed, float]] = field(default_factory=deque)
    """For what there is no room, of whom, who is not heard meanwhile, and since when."""
    moved_at: float = 0.0
    """When the connection last took one, or a part of one, or had nothing to take."""

    def offer(self, source: bytes, message: Addressed, limit: int) -> bool:
        """False when there is no room for it."""
        size = len(message.header) + len(message.payload)
        if not self.room.is_enough(source, size, limit):
            return False
        if not self.entries and self.written is None:
            self.moved_at = time.monotonic()
        frames: list[Frame] = [addressed(source, message.header), message.payload]
        self.entries.append((source, frames, size))
        self.room.take(source, size)
        return True

    def feed(self) -> None:
        """Hands on what the connection takes now. Raises Broken."""
        self.connection.flush()
        while self.connection.is_idle:
            if self.written is not None:
                self.moved_at = time.monotonic()
                self.room.give_back(*self.written)
                self.written = None
            if not self.entries:
                return
            source, frames, size = self.entries.popleft()
            self.written = source, size
            self.connection.send(frames)


class Exchange:
    """Whoever was invited speaks with the others. Owned by one thread.

    `elsewhere` takes a message (source, destination, header, payload) for a destination that is not
    here. Raises OSError when it cannot listen at the addresses.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        watch: Watch,
        seals: bool,
        queue_bytes: int,
        counters: Counters,
        elsewhere: Callable[[bytes, bytes, bytes, memoryview], None],
    ) -> None:
        self.entrance: Entrance[Addressed] = Entrance(addresses, watch, seals, _begun)
        self._limit = queue_bytes
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
        for _ in range(BATCH_MESSAGES if connection.hears else 0):
            try:
                message = self.entrance.receive(connection)
            except Malformed:
                self._counters.dropped += 1
                continue
            if message is None or not self._forward(connection, message):
                break
        queue = self._queues.get(connection.name)
        if queue is not None and queue.connection is connection:
            self._feed(queue)

    def tick(self) -> None:
        now = time.monotonic()
        self.entrance.tick(now)
        for queue in [*self._queues.values()]:
            if queue.connection.fileno() < 0:
                self._drop(queue)
                continue
            if queue.connection.is_leaving:
                queue.moved_at = now
            if queue.held and now > min(queue.moved_at + PATIENCE_S, queue.held[0][2] + HOLD_S):
                self._let_go(queue)

    def _forward(self, source: Connection[Addressed], message: Addressed) -> bool:
        """Whether more may be read of this source."""
        destination = self.entrance.named.get(message.name)
        if destination is None:
            self._elsewhere(source.name, *message)
            return True
        queue = self._queues.get(message.name)
        if queue is None or queue.connection is not destination:
            if queue is not None:
                self._drop(queue)
            queue = self._queues[message.name] = _Queue(destination)
        if queue.offer(source.name, message, self._limit):
            self._count(message)
            self._feed(queue)
        elif time.monotonic() - queue.moved_at <= PATIENCE_S:
            queue.held.append((source, message, time.monotonic()))
            source.hear(False)
            return False
        else:
            self._counters.dropped += 1
        return True

    def _count(self, message: Addressed) -> None:
        self._counters.messages += 1
        self._counters.bytes += len(message.header) + len(message.payload)

    def _feed(self, queue: _Queue) -> None:
        try:
            queue.feed()
            while queue.held and queue.offer(queue.held[0][0].name, queue.held[0][1], self._limit):
                source, message, _ = queue.held.popleft()
                self._count(message)
                source.hear(True)
                queue.feed()
        except Broken:
            self.entrance.end(queue.connection)
            self._drop(queue)

    def _let_go(self, queue: _Queue) -> None:
        """Drops what is held, and hears their sources again."""
        self._counters.dropped += len(queue.held)
        for source, _, _ in queue.held:
            source.hear(True)
        queue.held.clear()

    def _drop(self, queue: _Queue) -> None:
        self._let_go(queue)
        self._counters.dropped += len(queue.entries)
        self._queues = {name: each for name, each in self._queues.items() if each is not queue}
