"""What comes in over a connection of our own: parts to messages (`framing.py`)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
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
    Target,
    nowhere,
)
from p2p.transport.pipe import Pipe
from p2p.transport.sealing import TAG_BYTES, Forged, Seal
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed

Argument = TypeVar("Argument")

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
    """After each piece of a payload, `PIECE_BYTES` at most, it is as if there were no more."""
    takes_parts: bool = False
    """Messages may come in parts; else that breaks the connection."""


class Incoming(Generic[M]):
    """Over one socket, part after part; what one is says what to expect after it."""

    def __init__(
        self, connected: socket.socket, watch: Watch, begin: Begin[M], reading: Reading
    ) -> None:
        self.received_bytes = 0
        self.coming: Coming[M] | None = None
        """Whose payload is being received, or a part of it,"""
        self._end = 0
        """up to here,"""
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
        self._part = self._left = memoryview(b"")
        """What is expected, and where the rest of it goes as it travels."""
        self._then = self.expect_message
        """What to do when that is there."""
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._kind = self._channel = self._payload_bytes = 0
        """What the last of them said."""
        self._whole: M | Malformed | None = None
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
        self._came = self._part = self._left = memoryview(b"")
        self._then = _stop

    def expect(self, part: memoryview, then: Callable[[], bool]) -> bool:
        """Fills this next, at most a record if it is sealed; then goes on with `then`.

        If that returns False it is as if there were no more, until the next call of `receive`.
        """
        self._part = self._left = part
        self._then = then
        if self._seal is not None and part:
            self._left = self._sealed[: len(part) + TAG_BYTES]
        return True

    def expect_message(self) -> bool:
        return self.expect(self._prefix, self._on_prefix)

    def receive(self) -> M | Malformed | None:
        """What came whole; None when nothing more is there until the next look. Raises Broken."""
        while self._whole is None and self._fill() and self._then():
            pass
        whole, self._whole = self._whole, None
        return whole

    def _fill(self) -> bool:
        """What is expected, with what comes; whether it is whole."""
        part, descriptor, ahead_bytes = self._left, self._socket.fileno(), len(self._ahead)
        while left := len(part):
            if self._came:
                came, self._came = self._came[:left], self._came[left:]
                part[: len(came)] = came
                part = part[len(came) :]
            elif not self._watch.is_readable(descriptor):
                self._left = part
                return False
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
        self._left = part
        if self._seal is not None and self._part:
            self._open(self._seal, self._part)
        return True

    def _receive(self, call: Callable[[int, Argument], int], argument: Argument) -> int:
        """How many bytes came by this call; 0: nothing is there. Raises Broken."""
        try:
            size = call(self._socket.fileno(), argument)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Broken(str(error)) from None
        if not size:
            raise Broken("the other end has closed it")
        self.received_bytes += size
        return size

    def _open(self, seal: Seal, plain: memoryview) -> None:
        try:
            seal.open(self._sealed[: len(plain) + TAG_BYTES], plain)
        except Forged as error:
            raise Broken(str(error)) from None

    def _all(self) -> list[Coming[M]]:
        parted = [*self._parted.values()]
        is_other = self.coming is not None and self.coming not in parted
        return [*parted, self.coming] if self.coming is not None and is_other else parted

    # --- part after part --------------------------------------------------------------------

    def _on_prefix(self) -> bool:
        self._kind, self._channel, header_bytes, self._payload_bytes = PREFIX.unpack(self._prefix)
        if header_bytes > HEADER_LIMIT_BYTES or self._payload_bytes > LARGEST_BYTES:
            raise Broken("a message as long as none may be")
        if (header_bytes == 0) != (self._kind in (GOES_ON, ENDS)):
            raise Broken("a message without a header, or a part with one")
        if self._kind in (BEGINS, GOES_ON, ENDS) and not self._reading.takes_parts:
            raise Broken("a message in parts")
        if self._kind in (GOES_ON, ENDS) and self._channel not in self._parted:
            raise Broken("a part of nothing")
        if self._kind == ENDS and self._payload_bytes:
            raise Broken("an end with a payload")
        return self.expect(memoryview(bytearray(header_bytes)), self._on_header)

    def _on_header(self) -> bool:
        if self._kind == ENDS:
            del self._parted[self._channel]
            return self.expect_message()
        if self._kind == GOES_ON:
            coming = self._parted[self._channel]
            if coming.come + self._payload_bytes > coming.size:
                raise Broken("more of a message than there is")
        else:
            coming = self._begun(self._kind, bytes(self._part), self._payload_bytes)
        follows = self._payload_bytes
        if self._kind == BEGINS:
            self._parted[self._channel] = coming
            follows = 0
        self.coming, self._end = coming, coming.come + follows
        return self._go_on(coming)

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

    def _go_on(self, coming: Coming[M]) -> bool:
        """With the next of the payload, or with what comes after it."""
        size = self._end - coming.come
        if not size:
            return self._on_end(coming)
        if isinstance(coming.target, Pipe):
            self._then = self._on_pipe
            return True
        if not isinstance(coming.target, memoryview):
            if not self._piece:
                self._piece = memoryview(bytearray(self._piece_bytes + ALIGNED_BYTES))
            kept = len(coming.kept)
            self._piece[:kept] = coming.kept
            piece = self._piece[kept : kept + min(size, self._piece_bytes)]
            return self.expect(piece, self._on_piece)
        if self._seal is not None:
            # what is not what was sent must not get where others may read it
            return self.expect(self._piece[: min(size, RECORD_BYTES)], self._on_record)
        if self._reading.pauses:
            size = min(size, PIECE_BYTES)
        return self.expect(coming.target[coming.come : coming.come + size], self._on_place)

    def _on_place(self) -> bool:
        return self._moved_to(self._underway, self._underway.come + len(self._part))

    def _on_record(self) -> bool:
        coming, end = self._underway, self._underway.come + len(self._part)
        if isinstance(coming.target, memoryview):  # else nobody wants it any more
            coming.target[coming.come : end] = self._part
        return self._moved_to(coming, end, ends_piece=end % PIECE_BYTES == 0)

    def _on_piece(self) -> bool:
        coming = self._underway
        assert not isinstance(coming.target, memoryview | Pipe)
        start, end = coming.come - len(coming.kept), coming.come + len(self._part)
        size = end - start
        taken = size if end == coming.size else size // ALIGNED_BYTES * ALIGNED_BYTES
        coming.kept = bytes(self._piece[taken:size])
        if taken:
            coming.target(start, self._piece[:taken])
        return self._moved_to(coming, end)

    def _on_pipe(self) -> bool:
        """What fits into it, if something is there."""
        coming = self._underway
        if not isinstance(coming.target, Pipe):  # any more
            return self._go_on(coming)
        assert not self._came  # it would be overtaken
        size = self._receive(coming.target.take, self._end - coming.come)
        if not size:
            self._watch.found_empty(self._socket.fileno())
            return False
        return self._moved_to(coming, coming.come + size)

    def _moved_to(self, coming: Coming[M], end: int, ends_piece: bool = True) -> bool:
        coming.come = end
        pauses = self._reading.pauses and ends_piece and end < self._end
        return self._go_on(coming) and not pauses

    def _on_end(self, coming: Coming[M]) -> bool:
        """Of the payload, or of a part of it."""
        self.coming = None
        if coming.come == coming.size:
            if self._parted.get(self._channel) is coming:
                del self._parted[self._channel]
            self._whole = coming.message
        return self.expect_message()

    @property
    def _underway(self) -> Coming[M]:
        assert self.coming is not None
        return self.coming


def _stop() -> bool:
    """What to do with what comes to a closed connection."""
    return False
