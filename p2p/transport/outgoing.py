"""What goes out over a connection of our own, a part at a time (`framing.py`)."""

from __future__ import annotations

import socket
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ

from p2p.transport.framing import PREFIX, RECORD_BYTES
from p2p.transport.pipe import Pipe
from p2p.transport.sealing import TAG_BYTES, Seal
from p2p.transport.wire import Frame


class Outgoing:
    """Over one socket; after `first`, if there is something that comes before all messages."""

    def __init__(self, connected: socket.socket, first: bytes = b"") -> None:
        self.is_open = False
        """What comes first is sent, so messages can be."""
        self.taken_bytes = len(first)
        """What there was to be sent so far,"""
        self.sent_bytes = 0
        """and what of it the kernel has taken."""
        self._socket = connected
        self._waiting: deque[tuple[bytes, Frame, Frame | Pipe]] = deque()
        """Prefixes, headers and payloads."""
        self._parts: Iterator[list[Frame]] = iter([[first]] if first else ())
        self._unsent: list[Frame] = []
        self._pipe: Pipe | None = None
        """What follows the unsent."""
        self._seal: Seal | None = None
        self._sealed = memoryview(b"")

    def seal(self, seal: Seal) -> None:
        """All that follows."""
        self._seal = seal
        self._sealed = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))

    @property
    def waiting(self) -> int:
        """Messages of which nothing has been sent yet."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """All has been sent."""
        return not self._waiting and not self._unsent and self._pipe is None

    @property
    def unacknowledged(self) -> int:
        """Bytes that the kernel has taken, and the other end's has not; of a link that is slow it
        may be seconds' worth."""
        left = array("i", [0])
        if self._socket.fileno() >= 0:
            with suppress(OSError):  # a kernel that does not tell
                ioctl(self._socket, TIOCOUTQ, left)
        return left[0]

    def add(self, kind: int, channel: int, header: Frame, payload: Frame | Pipe, size: int) -> None:
        """What is to be sent; `size` is what is said of the payload's."""
        self._waiting.append((PREFIX.pack(kind, channel, len(header), size), header, payload))
        self.taken_bytes += self._travelling_bytes(header, payload)

    def replace_pipe(self, pipe: Pipe, rest: memoryview) -> None:
        """By what was left in it, whether it is being sent or waits for that."""
        if self._pipe is pipe:
            self._pipe = None
            self._unsent.append(rest)
            return
        for index, (prefix, header, payload) in enumerate(self._waiting):
            if payload is pipe:
                self._waiting[index] = prefix, header, rest

    def flush(self) -> bool:
        """Writes what can be written now; whether that was all. Raises OSError."""
        try:
            while self._unsent or self._pipe or self._begin_next():
                if self._unsent:
                    sent = self._socket.sendmsg(self._unsent)
                    self._unsent = _rest(self._unsent, sent)
                elif self._pipe is not None:
                    sent = self._pipe.give(self._socket.fileno())
                self.sent_bytes += sent
                if self._unsent:  # there is no more room: not to be found out by another call
                    return False
        except BlockingIOError:
            return False
        return True

    def _begin_next(self) -> bool:
        """The next part is what is to be sent; False when there is none."""
        self._pipe = None
        while (part := next(self._parts, None)) is None:
            self.is_open = True
            if not self._waiting:
                return False
            self._parts = self._message(*self._waiting.popleft())
        self._unsent = part
        return True

    def _travelling_bytes(self, header: Frame, payload: Frame | Pipe) -> int:
        """How long it is as it travels."""
        plain = PREFIX.size + len(header) + len(payload)
        if self._seal is None:
            return plain
        return plain + TAG_BYTES * (1 + (len(header) > 0) + -(-len(payload) // RECORD_BYTES))

    def _message(
        self, prefix: bytes, header: Frame, payload: Frame | Pipe
    ) -> Iterator[list[Frame]]:
        """As it travels, part by part; each is sent before the next is made."""
        if isinstance(payload, Pipe):
            self._pipe = payload
            yield [prefix, header]
        elif self._seal is None:
            yield [prefix, header, payload]
        else:
            yield [self._closed(self._seal, each) for each in (prefix, header) if each]
            payload = memoryview(payload)
            for start in range(0, len(payload), RECORD_BYTES):
                record = payload[start : start + RECORD_BYTES]
                sealed = self._sealed[: len(record) + TAG_BYTES]
                self._seal.close(record, sealed)
                yield [sealed]

    @staticmethod
    def _closed(seal: Seal, plain: Frame) -> memoryview:
        sealed = memoryview(bytearray(len(plain) + TAG_BYTES))
        seal.close(plain, sealed)
        return sealed


def _rest(frames: list[Frame], sent: int) -> list[Frame]:
    """What is left of them after the first `sent` bytes."""
    for index, frame in enumerate(frames):
        size = len(frame)
        if sent < size:
            return [memoryview(frame)[sent:], *frames[index + 1 :]]
        sent -= size
    return []
