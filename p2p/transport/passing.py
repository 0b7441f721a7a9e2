"""What a relay has for one destination: messages, of which the last parts may be yet to come.

Of a message that comes slowly, or is long, the destination gets parts before the rest is there.
Parts of several are mixed, so that one whose source stops holds up no other.

A payload comes into memory of its own; or, where nothing waits for the destination and nothing is
sealed, into a pipe, from which the kernel moves it on (`pipe.py`). Then the source is not heard
until the pipe is empty. If that takes `PIPE_PATIENCE_S` the rest comes into memory after all, so
that the source is not kept from others.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from p2p.transport.framing import nowhere
from p2p.transport.incoming import Coming
from p2p.transport.pipe import Pipe
from p2p.transport.stream import Connection
from p2p.transport.wire import Frame, Malformed

PART_BYTES = 256 << 10
"""Of a message that is still coming so much is passed on at once, or more."""
PIPE_PATIENCE_S = 0.05


def addressed(name: bytes, header: Frame) -> bytes:
    return b"".join((bytes([len(name)]), name, header))


def opened(closed: bytes) -> tuple[bytes, bytes]:
    """The name and the header that `addressed` has closed. Raises Malformed."""
    end = 1 + closed[0] if closed else 0
    if not 0 < end <= len(closed):
        raise Malformed("a large message without an address")
    return closed[1:end], closed[end:]


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


@dataclass(slots=True, eq=False)
class Passing:
    """A message on its way."""

    name: bytes
    """Whom it is for."""
    header: bytes
    payload_bytes: int
    payload: memoryview | Pipe
    source: Connection[Passing] = field(init=False)
    coming: Coming[Passing] | None = None
    """None: it is whole."""
    queue: Queue | None = None
    given: int = 0
    """Of its payload, in bytes, the destination's connection was given so many,"""
    channel: int | None = None
    """in which it was given its header."""
    is_over: bool = False
    """Its destination is gone, or its source."""
    waits_since: float = 0.0
    """For its destination, what is in its pipe."""

    @property
    def size(self) -> int:
        return len(self.header) + self.payload_bytes

    @property
    def come(self) -> int:
        return self.payload_bytes if self.coming is None else self.coming.come

    @property
    def pipe(self) -> Pipe | None:
        return self.payload if isinstance(self.payload, Pipe) else None

    def leave_pipe(self, pipes: list[Pipe]) -> memoryview:
        """Its payload is in memory from now on, and its pipe, if it has one, among the others; what
        was left in that."""
        pipe = self.pipe
        if pipe is None:
            return memoryview(b"")
        memory = self.payload = np.empty(self.payload_bytes, np.uint8).data
        rest = memory[self.come - len(pipe) : self.come]
        pipe.drain_into(rest)
        pipes.append(pipe)
        if self.coming is not None:
            self.coming.target = memory
        self.source.hear(True)
        return rest

    @property
    def is_ready(self) -> bool:
        """There is enough that it is worth to be given."""
        least = 1 if self.pipe is not None else PART_BYTES
        return self.coming is None or self.come - self.given >= least


@dataclass(slots=True, eq=False)
class Queue:
    """What waits for one connection, the oldest first."""

    connection: Connection[Passing]
    limit: int
    """For its room, in bytes."""
    pipes: list[Pipe]
    """That are empty."""
    room: Room = field(default_factory=Room)
    entries: deque[Passing] = field(default_factory=deque)
    leaving: Passing | None = None
    """Of which the connection is sending something."""
    held: deque[tuple[Passing, float]] = field(default_factory=deque)
    """For what there is no room, whose source is not heard meanwhile, and since when."""
    moved_at: float = 0.0
    """When the connection last took something, or had nothing to take."""
    channels: set[int | None] = field(default_factory=set)
    """In which messages are sent of which more is to come."""

    @property
    def _all(self) -> set[Passing]:
        return {*self.entries, *([self.leaving] if self.leaving is not None else [])}

    @property
    def takes_pipes(self) -> bool:
        """Nothing waits in memory."""
        return not self.held and all(each.pipe is not None for each in self.entries)

    def offer(self, passing: Passing) -> bool:
        """False when there is no room for it."""
        if not self.room.is_enough(passing.source.name, passing.size, self.limit):
            return False
        self.room.take(passing.source.name, passing.size)
        passing.queue = self
        if not self.entries and self.leaving is None:
            self.moved_at = time.monotonic()
        self.entries.append(passing)
        return True

    def feed(self) -> None:
        """Hands on what the connection takes now. Raises Broken."""
        self.connection.flush()
        while self.connection.is_idle:
            self._settle()
            passing = next((each for each in self.entries if each.is_ready), None)
            if passing is None:
                return
            self._give(passing)

    def tick(self, now: float) -> int:
        """How many messages are lost because their sources are gone."""
        if self.connection.is_leaving or self.connection.is_idle:
            self.moved_at = now
        for passing in self._all:
            pipe = passing.pipe
            if pipe and now - passing.waits_since > PIPE_PATIENCE_S:
                self.connection.replace_pipe(pipe, passing.leave_pipe(self.pipes))
        lost = [each for each in self.entries if each.coming and each.source.fileno() < 0]
        for passing in lost:
            passing.is_over = True
            self._forget(passing)
            if passing is not self.leaving:
                self._release(passing)
        return len(lost)

    def close(self) -> int:
        """The connection is gone; how many messages that are whole are lost."""
        for passing in self._all:
            passing.is_over = True
            if passing.coming is not None:
                passing.coming.target = nowhere
            if passing.pipe is not None:
                passing.pipe.close()
                passing.source.hear(True)
        return len([each for each in self.entries if each.coming is None]) + self.let_go()

    def hold_back(self, passing: Passing) -> None:
        """Its source is not heard as long as something is in its pipe."""
        if passing.pipe:
            passing.waits_since = time.monotonic()
            passing.source.hear(False)

    def let_go(self) -> int:
        """Drops what is held, and hears their sources again; how many there were."""
        for passing, _ in self.held:
            passing.source.hear(True)
        dropped = len(self.held)
        self.held.clear()
        return dropped

    def _give(self, passing: Passing) -> None:
        is_end = passing.coming is None
        header, part = addressed(passing.source.name, passing.header), passing.payload
        if isinstance(part, memoryview):
            part = part[passing.given : passing.come]
        self.leaving, passing.given = passing, passing.come
        if is_end and passing.channel is None and isinstance(part, memoryview):
            self.connection.send([header, part])
        else:
            if passing.channel is None:
                passing.channel = next(each for each in count() if each not in self.channels)
                self.channels.add(passing.channel)
                self.connection.send_beginning(passing.channel, header, passing.payload_bytes)
            self.connection.send_part(passing.channel, part)
        if is_end:
            self._forget(passing)

    def _forget(self, passing: Passing) -> None:
        """Nothing more of it is given."""
        self.entries.remove(passing)
        self.channels.discard(passing.channel)

    def _settle(self) -> None:
        """The connection has sent what it was given."""
        passing, self.leaving = self.leaving, None
        if passing is None:
            return
        self.moved_at = time.monotonic()
        if passing.pipe is not None:
            passing.source.hear(True)
        if passing not in self.entries:
            self._release(passing)

    def _release(self, passing: Passing) -> None:
        """Nothing of it is left here, but what nobody wants."""
        self.room.give_back(passing.source.name, passing.size)
        if passing.pipe:
            passing.pipe.close()
        elif passing.pipe is not None:
            self.pipes.append(passing.pipe)
