"""What a relay has for one destination: messages, of which the last parts may be yet to come.

The destination gets a message in parts, which are there before the rest is, or fit between those of
others: sources take turns, and one that stops, or sends what is long, holds up no other.

A payload comes into memory of its own; or, where nothing waits for the destination and nothing is
sealed, into a pipe, from which the kernel moves it on (`pipe.py`). Then the source is not heard
until the pipe is empty. What is left of a message that had to wait for `PIPE_PATIENCE_S` altogether
comes into memory, so that its source is not kept from others.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from p2p.transport.framing import nowhere
from p2p.transport.incoming import Coming
from p2p.transport.pipe import Pipe, Pipes
from p2p.transport.stream import JUDGE_EVERY_S, Connection
from p2p.transport.wire import Frame, Malformed

PART_BYTES = 256 << 10
"""Of a message that comes fast so much is passed on at once, or more,"""
PART_LIMIT_BYTES = 1 << 20
"""but no more than this."""
PIPE_PATIENCE_S = 0.25
"""And up to one of the relay's ticks more."""
STOPPED_S = 3.0
"""A message is given up of which so long nothing more comes, for others may need its room."""
ENTRY_BYTES = 1 << 10
"""What a message takes without its header and payload."""


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
    """None: nothing more of it comes."""
    come: int = 0
    """Of the payload, in bytes,"""
    given: int = 0
    """and of these what the destination's connection was given."""
    queue: Queue | None = None
    channel: int | None = None
    """In which it goes to the destination; None: nothing of it has gone yet."""
    is_over: bool = False
    """Its destination is gone, or its source, or that has stopped."""
    moved_at: float = field(default_factory=time.monotonic)
    """When more of it came,"""
    given_at: float = 0.0
    """and when the connection was last given some of it."""
    waits_since: float = 0.0
    """What is in its pipe,"""
    waited_s: float = 0.0
    """and how long it waited before."""
    holds: int = 0
    """Of the room, in bytes."""

    @property
    def size(self) -> int:
        return ENTRY_BYTES + len(self.header) + self.payload_bytes

    @property
    def is_whole(self) -> bool:
        return self.come == self.payload_bytes

    @property
    def pipe(self) -> Pipe | None:
        return self.payload if isinstance(self.payload, Pipe) else None

    def has_come(self, bytes_come: int) -> None:
        if bytes_come != self.come:
            self.come, self.moved_at = bytes_come, time.monotonic()

    def is_ready(self, now: float) -> bool:
        """There is enough that it is worth to be given."""
        is_late = self.pipe is not None or now - self.given_at > JUDGE_EVERY_S
        return self.is_whole or self.come - self.given >= (1 if is_late else PART_BYTES)

    def has_waited(self, now: float) -> bool:
        """For too long in its pipe, in which there is something."""
        return bool(self.pipe) and self.waited_s + now - self.waits_since > PIPE_PATIENCE_S

    def has_stopped(self, now: float) -> bool:
        """Nothing comes of it any more."""
        is_late = self.source.hears and now - self.moved_at > STOPPED_S
        return not self.is_whole and (is_late or self.source.fileno() < 0)

    def leave_pipe(self, pipes: Pipes) -> memoryview:
        """Its payload is in memory from now on; what was left in its pipe, if it had one."""
        pipe = self.pipe
        if pipe is None:
            return memoryview(b"")
        memory = self.payload = np.empty(self.payload_bytes, np.uint8).data
        rest = memory[self.come - len(pipe) : self.come]
        pipe.drain_into(rest)
        pipes.give_back(pipe)
        if self.coming is not None:
            self.coming.target = memory
        self.source.hear(True)
        return rest

    def end(self) -> None:
        """Nothing more of it is of use."""
        self.is_over = True
        if self.coming is not None:
            self.coming.target = nowhere
            self.coming = None


@dataclass(slots=True, eq=False)
class Queue:
    """What waits for one connection, the oldest of each source first."""

    connection: Connection[Passing]
    limit: int
    """For its room, in bytes."""
    pipes: Pipes
    room: Room = field(default_factory=Room)
    lines: dict[Connection[Passing], deque[Passing]] = field(default_factory=dict)
    """By their sources, of which the first is next."""
    leaving: Passing | None = None
    """Of which the connection is sending a part."""
    held: deque[tuple[Passing, float]] = field(default_factory=deque)
    """For what there is no room, whose source is not heard meanwhile, and since when."""
    moved_at: float = 0.0
    """When the connection last took something, or had nothing to take."""
    channels: set[int] = field(default_factory=set)
    """In which more is to come."""

    @property
    def takes_pipes(self) -> bool:
        """Nothing waits in memory."""
        return not self.held and all(
            each.pipe is not None for line in self.lines.values() for each in line
        )

    def offer(self, passing: Passing) -> bool:
        """False when there is no room for it."""
        if not self.room.is_enough(passing.source.name, passing.size, self.limit):
            return False
        self.room.take(passing.source.name, passing.size)
        passing.queue, passing.holds = self, passing.size
        passing.given_at = time.monotonic()
        if not self.lines and self.leaving is None:
            self.moved_at = passing.given_at
        self.lines.setdefault(passing.source, deque()).append(passing)
        return True

    def feed(self) -> None:
        """Hands on what the connection takes now. Raises Broken."""
        self.connection.flush()
        while self.connection.is_idle:
            now = time.monotonic()
            self._settle(now)
            passing = next((line[0] for line in self.lines.values() if line[0].is_ready(now)), None)
            if passing is None:
                return
            self._give(passing, now)

    def hold_back(self, passing: Passing) -> None:
        """Its source is not heard as long as something is in its pipe."""
        passing.waits_since = time.monotonic()
        if passing.has_waited(passing.waits_since):
            self._leave_pipe(passing)
        elif passing.pipe:
            passing.source.hear(False)

    def tick(self, now: float) -> int:
        """How many messages are given up. Raises Broken."""
        if self.connection.is_leaving or self.connection.is_idle:
            self.moved_at = now
        newest = [line[-1] for line in self.lines.values()]
        for passing in self._with_leaving(newest):
            if passing.has_waited(now):
                self._leave_pipe(passing)
        stopped = [each for each in newest if each.has_stopped(now)]
        for passing in stopped:
            self._give_up(passing)
        return len(stopped)

    def close(self) -> int:
        """The connection is gone; how many messages with it."""
        waiting = [each for line in self.lines.values() for each in line]
        for passing in self._with_leaving(waiting):
            passing.end()
            if passing.pipe is not None:
                self.pipes.give_back(passing.pipe)
                passing.source.hear(True)
        return len(waiting) + self.let_go()

    def let_go(self) -> int:
        """Drops what is held, and hears their sources again; how many there were."""
        for passing, _ in self.held:
            passing.source.hear(True)
        dropped = len(self.held)
        self.held.clear()
        return dropped

    def _with_leaving(self, waiting: list[Passing]) -> set[Passing]:
        return {*waiting} if self.leaving is None else {*waiting, self.leaving}

    def _give(self, passing: Passing, now: float) -> None:
        payload, start, end = passing.payload, passing.given, passing.come
        if isinstance(payload, memoryview):
            end = min(end, start + PART_LIMIT_BYTES)
        self.leaving, passing.given, passing.given_at = passing, end, now
        is_last = end == passing.payload_bytes
        line = self.lines.pop(passing.source)
        if is_last:
            line.popleft()
        if line:
            self.lines[passing.source] = line  # behind the others
        header = addressed(passing.source.name, passing.header)
        if is_last and passing.channel is None and isinstance(payload, memoryview):
            self.connection.send([header, payload])
            return
        if passing.channel is None:
            passing.channel = next(each for each in count() if each not in self.channels)
            self.channels.add(passing.channel)
            self.connection.send_beginning(passing.channel, header, passing.payload_bytes)
        if is_last:
            self.channels.remove(passing.channel)
        part = payload[start:end] if isinstance(payload, memoryview) else payload
        self.connection.send_part(passing.channel, part)

    def _settle(self, now: float) -> None:
        """The connection has sent what it was given."""
        passing, self.leaving = self.leaving, None
        if passing is None:
            return
        self.moved_at = now
        if passing.pipe is not None and not passing.source.hears:
            passing.waited_s += now - passing.waits_since
            passing.source.hear(True)
        if passing.is_over or passing.given == passing.payload_bytes:
            self._release(passing)
        else:
            self._hold(passing, passing.size - passing.given)

    def _give_up(self, passing: Passing) -> None:
        passing.end()
        line = self.lines[passing.source]
        line.remove(passing)
        if not line:
            del self.lines[passing.source]
        if passing.channel is not None:
            self.channels.remove(passing.channel)
            self.connection.send_end(passing.channel)
        if passing is not self.leaving:
            self._release(passing)

    def _leave_pipe(self, passing: Passing) -> None:
        pipe = passing.pipe
        rest = passing.leave_pipe(self.pipes)
        if pipe is not None and passing is self.leaving:
            self.connection.replace_pipe(pipe, rest)

    def _release(self, passing: Passing) -> None:
        """Nothing of it is left here, or of use."""
        self._hold(passing, 0)
        if passing.pipe is not None:
            self.pipes.give_back(passing.pipe)

    def _hold(self, passing: Passing, size: int) -> None:
        self.room.give_back(passing.source.name, passing.holds - size)
        passing.holds = size
