"""The part of a relay that hands on what is large, over connections of our own (`stream.py`).

A peer's header begins with the destination's name, and arrives with the source's: a byte with its
length, the name, the header itself. Messages are queued for their destination (`passing.py`), at
most `queue_bytes` of them, half of that from one source, and passed on while they come if there is
room. What does not fit is received whole and held for `HOLD_S` at most, and nothing more read from
its source, as long as the destination takes something every `PATIENCE_S`; else it is dropped and
counted, so nobody waits for one that does not read. So for each source there is one message more,
held or on its way here.

A destination that has no such connection is reached by the relay's other way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from p2p.transport.entrance import Entrance
from p2p.transport.framing import HEADER_LIMIT_BYTES, Broken
from p2p.transport.incoming import Reading
from p2p.transport.passing import Passing, Queue, opened
from p2p.transport.pipe import Pipe, Pipes
from p2p.transport.stream import Address, Connection
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed

BATCH_MESSAGES = 16
PIPED_FROM_BYTES = 512 << 10
"""Less is received and sent by one call each."""
PIPES = 32
"""Half of what an unprivileged user may have of their size by default."""
NAME_LIMIT_BYTES = 256
PATIENCE_S, HOLD_S = 0.5, 2.0
"""Well below the time after which a source gives a connection up that takes nothing."""
UNIX_SUFFIX = ".large"
"""Of the relay's own Unix socket's name."""


class Counters(Protocol):
    messages: int
    bytes: int
    dropped: int


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
        self.entrance: Entrance[Passing] = Entrance(
            addresses, watch, seals, self._begun, Reading(pauses=True)
        )
        self._limit = queue_bytes
        self._counters = counters
        self._elsewhere = elsewhere
        self._queues: dict[bytes, Queue] = {}
        self._pipes = Pipes(0 if seals else PIPES)

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
            if message is None:
                self._pass_on(connection)
                break
            self._forward(connection, message)
            if not connection.hears:
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
            try:
                self._counters.dropped += queue.tick(now)
            except Broken:
                self.entrance.end(queue.connection)
            self._feed(queue)
            if queue.held and now > min(queue.moved_at + PATIENCE_S, queue.held[0][1] + HOLD_S):
                self._counters.dropped += queue.let_go()

    def _begun(self, header: bytes, size: int | None) -> tuple[Passing, memoryview | Pipe]:
        if size is None:
            raise Malformed("a large message without a payload")
        name, rest = opened(header)
        if len(rest) > HEADER_LIMIT_BYTES - NAME_LIMIT_BYTES:
            raise Malformed("a header that is too long to be passed on")
        pipe = self._pipe_to(name, size)
        payload = np.empty(size, np.uint8).data if pipe is None else pipe
        return Passing(name, rest, size, payload), payload

    def _pipe_to(self, name: bytes, size: int) -> Pipe | None:
        queue = self._queue_to(name)
        is_fit = size >= PIPED_FROM_BYTES and queue is not None and queue.takes_pipes
        return self._pipes.take() if is_fit else None

    def _pass_on(self, source: Connection[Passing]) -> None:
        """What has come of a message that is not whole."""
        coming = source.coming
        if coming is None or not isinstance(coming.message, Passing) or coming.message.is_over:
            return
        passing = coming.message
        passing.source, passing.coming = source, coming
        passing.has_come(coming.come)
        if passing.queue is None:
            queue = self._queue_to(passing.name)
            if queue is None or not queue.offer(passing):
                passing.leave_pipe(self._pipes)
                return
        if passing.queue is not None:
            self._feed(passing.queue)
            passing.queue.hold_back(passing)

    def _forward(self, source: Connection[Passing], passing: Passing) -> None:
        """It has come whole."""
        passing.source, passing.coming = source, None
        passing.has_come(passing.payload_bytes)
        if passing.is_over:
            return
        queue = passing.queue or self._queue_to(passing.name)
        if queue is not None and (passing.queue is queue or queue.offer(passing)):
            self._count(passing)
            self._feed(queue)
            queue.hold_back(passing)
            return
        passing.leave_pipe(self._pipes)
        if queue is None:
            assert isinstance(passing.payload, memoryview)
            self._elsewhere(source.name, passing.name, passing.header, passing.payload)
        elif time.monotonic() - queue.moved_at <= PATIENCE_S:
            queue.held.append((passing, time.monotonic()))
            source.hear(False)
        else:
            self._counters.dropped += 1

    def _queue_to(self, name: bytes) -> Queue | None:
        destination = self.entrance.named.get(name)
        if destination is None:
            return None
        queue = self._queues.get(name)
        if queue is None or queue.connection is not destination:
            if queue is not None:
                self._drop(queue)
            queue = self._queues[name] = Queue(destination, self._limit, self._pipes)
        return queue

    def _count(self, passing: Passing) -> None:
        self._counters.messages += 1
        self._counters.bytes += len(passing.header) + passing.payload_bytes

    def _feed(self, queue: Queue) -> None:
        if queue.connection.fileno() < 0:  # it ended: nobody is to wait for it
            self._drop(queue)
            return
        try:
            queue.feed()
            while queue.held and queue.offer(queue.held[0][0]):
                passing, _ = queue.held.popleft()
                self._count(passing)
                passing.source.hear(True)
                queue.feed()
        except Broken:
            self.entrance.end(queue.connection)
            self._drop(queue)

    def _drop(self, queue: Queue) -> None:
        self._counters.dropped += queue.close()
        self._queues = {name: each for name, each in self._queues.items() if each is not queue}
