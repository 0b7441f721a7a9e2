"""What comes in over a connection of our own: parts to messages (`framing.py`)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from p2p.transport.framing import (
    ALIGNED_BYTES,
    BARE,
    BEGINS,
    ENDS,
    GOES_ON,
    HEADER_LIMIT_BYTES,
    LARGEST_BYTES,
    PIECE_BYTES,
    PREFIX,
    RECORD_BYTES,
    WHOLE,
    Begin,
    Broken,
    M,
    Take,
    Target,
    nowhere,
)
from p2p.transport.pipe import Pipe
from p2p.transport.sealing import TAG_BYTES, Forged, Seal
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed

W = TypeVar("W")

AHEAD_BYTES = 8 << 10
"""So much of what follows is received by the same call."""


@dataclass(slots=True, eq=False)
class Coming(Generic[M]):
    """A message of whose payload not all has come yet."""

    message: M | Malformed
    target: Target
    size: int
    """Of the payload, in bytes."""
    come: int = 0
    """Of these."""
    kept: bytes = b""
    """The last of them, which were not taken yet."""
    moved_at: float = float("inf")
    """When it was last seen that more had come; it is new otherwise."""
    seen: int = -1
    """How much that was."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How messages are received."""

    ahead: bool = False
    """What is small may be received before it is asked for."""
    pauses: bool = False
    """After each `PIECE_BYTES` of a payload it is as if there were no more."""
    takes_parts: bool = False
    """Messages may come in parts; else that breaks the connection."""


class Incoming(Generic[M]):
    """Over one socket."""

    def __init__(
        self, connected: socket.socket, watch: Watch, begin: Begin[M], reading: Reading
    ) -> None:
        self.received_bytes = 0
        self.coming: Coming[M] | None = None
        """Whose payload is being received, or a part of it,"""
        self._parted: dict[int, Coming[M]] = {}
        """and what comes in parts, by its channel."""
        self._judged_at = -float("inf")
        self._judged_bytes = 0
        self._socket = connected
        self._watch = watch
        self._begin = begin
        self._reading = reading
        self._ahead = memoryview(bytearray(AHEAD_BYTES if reading.ahead else 0))
        self._came = memoryview(b"")
        """Of that, what nobody has asked for yet."""
        self._seal: Seal | None = None
        self._sealed = memoryview(b"")
        self._piece_bytes = PIECE_BYTES
        self._piece = memoryview(b"")
        """For what was opened of a record, and for what is taken while it comes."""

    def seal(self, seal: Seal) -> None:
        """All that follows is sealed."""
        self._seal = seal
        self._sealed = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
        self._piece_bytes = RECORD_BYTES
        self._piece = memoryview(bytearray(RECORD_BYTES + ALIGNED_BYTES))

    @property
    def has_come(self) -> bool:
        """Something that follows the last message is here already."""
        return len(self._came) > 0

    @property
    def arriving(self) -> list[M]:
        """The messages of which the beginning has come, and more keeps coming."""
        return [
            each.message
            for each in self._all()
            if each.moved_at >= self._judged_at and not isinstance(each.message, Malformed)
        ]

    def tick(self, now: float) -> None:
        """What has not moved since the last time stands still."""
        has_moved = self.received_bytes != self._judged_bytes
        self._judged_at, self._judged_bytes = now, self.received_bytes
        for each in self._all():
            if each.come != each.seen or (each is self.coming and has_moved):
                each.seen, each.moved_at = each.come, now

    def forget(self) -> None:
        """What has not come whole; the connection is closed."""
        self.coming = None
        self._parted.clear()

    def messages(self) -> Iterator[M | Malformed | None]:
        """Those that come; None when nothing more is there until the next look. Raises Broken."""
        prefix = memoryview(bytearray(PREFIX.size))
        fill = self.fill if self._seal is None else partial(self._opened, self._seal)
        while True:
            yield from fill(prefix)
            kind, channel, header_bytes, payload_bytes = PREFIX.unpack(prefix)
            if header_bytes > HEADER_LIMIT_BYTES or payload_bytes > LARGEST_BYTES:
                raise Broken("a message as long as none may be")
            if (header_bytes == 0) != (kind in (GOES_ON, ENDS)):
                raise Broken("a message without a header, or a part with one")
            if kind in (BEGINS, GOES_ON, ENDS) and not self._reading.takes_parts:
                raise Broken("a message in parts")
            if kind in (GOES_ON, ENDS) and channel not in self._parted:
                raise Broken("a part of nothing")
            if kind == ENDS and payload_bytes:
                raise Broken("an end with a payload")
            header = memoryview(bytearray(header_bytes))
            yield from fill(header)
            if kind == GOES_ON:
                coming = self._parted[channel]
            elif kind == ENDS:
                del self._parted[channel]
                continue
            else:
                coming = self._begun(kind, bytes(header), payload_bytes)
            if kind == BEGINS:
                self._parted[channel] = coming
                payload_bytes = 0
            if coming.come + payload_bytes > coming.size:
                raise Broken("more of a message than there is")
            self.coming = coming
            yield from self._payload(fill, coming, payload_bytes)
            self.coming = None
            if coming.come == coming.size:
                if self._parted.get(channel) is coming:
                    del self._parted[channel]
                yield coming.message
            del coming  # so that the next one can come into the same memory

    def fill(self, part: memoryview) -> Iterator[None]:
        """With what comes next, as it comes."""
        descriptor, ahead_bytes = self._socket.fileno(), len(self._ahead)
        left = len(part)
        while left:
            if self._came:
                came, self._came = self._came[:left], self._came[left:]
                part[: len(came)] = came
                in_place = len(came)
            elif not self._watch.is_readable(descriptor):
                yield None
                continue
            else:
                # into its place, and what follows ahead; what is small goes by way of that too
                in_place = left if left >= ahead_bytes else 0
                into = [part, self._ahead] if in_place else [self._ahead]
                size = self._receive(os.readv, into)
                if size < in_place + ahead_bytes:  # no more: not to be found out by another call
                    self._watch.found_empty(descriptor)
                in_place = min(size, in_place)
                self._came = self._ahead[: size - in_place]
            part = part[in_place:]
            left -= in_place

    def _receive(self, call: Callable[[int, W], int], what: W) -> int:
        """How many bytes came by this call; 0: nothing is there. Raises Broken."""
        try:
            size = call(self._socket.fileno(), what)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Broken(str(error)) from None
        if not size:
            raise Broken("the other end has closed it")
        self.received_bytes += size
        return size

    def _all(self) -> list[Coming[M]]:
        parted = [*self._parted.values()]
        is_other = self.coming is not None and self.coming not in parted
        return [*parted, self.coming] if self.coming is not None and is_other else parted

    def _begun(self, kind: int, header: bytes, size: int) -> Coming[M]:
        try:
            if kind not in (BARE, WHOLE, BEGINS):
                raise Malformed(f"a message of the kind {kind}")
            message, target = self._begin(header, size if kind != BARE else None)
            if isinstance(target, memoryview) and len(target) != size:
                raise Malformed(f"a payload of {size} bytes where none belongs")
        except Malformed as error:  # what follows it can be read all the same
            return Coming(error, nowhere, size)
        return Coming(message, target, size)

    def _payload(
        self, fill: Callable[[memoryview], Iterator[None]], coming: Coming[M], size: int
    ) -> Iterator[None]:
        """The next so many bytes of it."""
        end = coming.come + size
        while coming.come < end:
            if isinstance(coming.target, memoryview):
                piece = coming.target[coming.come : end]
                if self._reading.pauses:
                    piece = piece[:PIECE_BYTES]
                yield from fill(piece)
                coming.come += len(piece)
            elif isinstance(coming.target, Pipe):
                coming.come += yield from self._piped(coming.target, end - coming.come)
            else:
                yield from self._taken(coming, coming.target, end)
            if self._reading.pauses and coming.come < end:
                yield None

    def _opened(self, seal: Seal, part: memoryview) -> Iterator[None]:
        for start in range(0, len(part), RECORD_BYTES):
            record = part[start : start + RECORD_BYTES]
            plain = self._piece[: len(record)]
            yield from self._record(seal, plain)
            record[:] = plain  # what is not what was sent must not get where others may read it

    def _piped(self, pipe: Pipe, limit: int) -> Generator[None, None, int]:
        assert not self._came  # it would be overtaken
        size = self._receive(pipe.take, limit)
        if not size:
            self._watch.found_empty(self._socket.fileno())
            yield None
        return size

    def _taken(self, coming: Coming[M], take: Take, end: int) -> Iterator[None]:
        if not len(self._piece):
            self._piece = memoryview(bytearray(self._piece_bytes + ALIGNED_BYTES))
        kept = coming.kept
        piece = self._piece[: len(kept) + min(end - coming.come, self._piece_bytes)]
        piece[: len(kept)] = kept
        if self._seal is None:
            yield from self.fill(piece[len(kept) :])
        else:
            yield from self._record(self._seal, piece[len(kept) :])
        start = coming.come - len(kept)
        coming.come = start + len(piece)
        is_last = coming.come == coming.size
        taken = len(piece) if is_last else len(piece) // ALIGNED_BYTES * ALIGNED_BYTES
        coming.kept = bytes(piece[taken:])
        if taken:
            take(start, piece[:taken])

    def _record(self, seal: Seal, plain: memoryview) -> Iterator[None]:
        sealed = self._sealed[: len(plain) + TAG_BYTES]
        yield from self.fill(sealed)
        try:
            seal.open(sealed, plain)
        except Forged as error:
            raise Broken(str(error)) from None
