"""Messages over a connection of our own, beside ZeroMQ's: for what is large.

ZeroMQ receives in a thread of its own, into memory that has left the processor's cache when the
message is whole. Here the one thread that adds also receives, and adds piece by piece what has just
come; a total can be received where it is to lie.

Whoever listens gives out tickets (`entrance.py`), over a connection that is authenticated. One
connection can be opened with each; it begins with the ticket and goes on with messages, both ways:

    number of frames: 1 byte | length of the header, of the payload: 4 bytes each, little-endian
    header | payload

If the ticket comes with a key, each of these parts, of the payload every `RECORD_BYTES`, is sealed
(`sealing.py`), and whoever changes anything breaks the connection.

All of it is owned by one thread and never waits. Not here: what the frames hold (`wire.py`), where
a payload is to lie, and whom to give a ticket.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from termios import TIOCOUTQ
from typing import Generic, TypeVar

import zmq

from p2p.transport.sealing import (
    INWARD,
    OUTWARD,
    TAG_BYTES,
    TICKET_BYTES,
    Forged,
    Invitation,
    Seal,
)
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, Malformed

RECORD_BYTES = 256 << 10
"""What is sealed or opened at once; both copies of it fit into a core's cache."""
PIECE_BYTES = 512 << 10
"""What is taken at once of a payload that is taken while it comes: half of a core's cache."""
AHEAD_BYTES = 8 << 10
"""What is smaller is received with what follows it, in one call."""
HEADER_LIMIT_BYTES = 64 << 10
LARGEST_BYTES = 32 << 20
"""Of a payload; what is larger is for ZeroMQ."""
JUDGE_EVERY_S = 0.05
"""What has not moved for less says nothing: a link that is slow may be between two packets."""
SILENCE_MS = 5000
"""A connection ends when so long nothing of what was sent is acknowledged."""
HOST_BUFFER_BYTES = 384 << 10
"""What may be on its way to a process of this very host, which the kernel doubles: it stays in a
core's cache. To other hosts the kernel adapts it to the way's length."""
UNIX_BUFFER_BYTES = 2 << 20
"""With less, a large message takes so many wake-ups that ZeroMQ is faster."""
_READ, _WRITE = int(zmq.POLLIN), int(zmq.POLLOUT)
_PREFIX = struct.Struct("<BII")

M = TypeVar("M")
Take = Callable[[int, memoryview], None]
"""Is given a payload piece by piece: the first byte's place, and bytes that are soon others."""
Target = memoryview | Take
Begin = Callable[[bytes, int | None], tuple[M, Target]]
"""Makes a message of its header and of the length of its payload, if it has one, which is yet to
come; says where that is to be written, or who takes it. Raises Malformed."""
Address = tuple[str, int] | Path
"""An IP address and a port, or a Unix socket."""


class Broken(Exception):
    """The connection came to its end."""


Admit = Callable[["Connection[M]", bytes], tuple[bytes, bytes]]
"""Whose ticket it is that a connection shows, and its key. Raises Broken for one of no use."""


class Connection(Generic[M]):
    """Either end of one. Whatever raises Broken has to be followed by `close`."""

    def __init__(
        self, connected: socket.socket, watch: Watch, begin: Begin[M], ahead: bool = False
    ) -> None:
        """`ahead`: what is small may be received before it is asked for, so `receive` has to be
        called until it returns None, or again without waiting."""
        self.name = b""
        """Of whoever showed a ticket here."""
        self.since: float | None = None
        """When it was first seen without one; the entrance's."""
        self.is_open = False
        """The ticket was shown, so messages can be sent."""
        self.taken_bytes = self.sent_bytes = self.received_bytes = 0
        """What this end was given to send, what of it the kernel has, and what has come here."""
        self._is_within = False
        """A payload is being received."""
        self._moved = (0, 0)
        """What had come to the other end, and to this one,"""
        self._judged_at = -float("inf")
        """when it was last compared."""
        self._stands_still = (False, False)
        """Whether it was no more than before, though it should."""
        self._socket = connected
        self._watch = watch
        self._begin = begin
        self._events = 0
        self._ahead = memoryview(bytearray(AHEAD_BYTES if ahead else 0))
        self._came = memoryview(b"")
        """Of that, what nobody has asked for yet."""
        self._sealed_out = self._sealed_in = memoryview(b"")
        self._piece = memoryview(b"")
        """For what was opened of a record, and for what is taken while it comes."""
        self._outward: Seal | None = None
        self._inward: Seal | None = None
        self._waiting: deque[Sequence[Frame]] = deque()
        self._parts: Iterator[list[Frame]] = iter(())
        self._unsent: list[Frame] = []
        self._received: Iterator[M | Malformed | None] = iter(())
        connected.setblocking(False)

    @classmethod
    def dialled(
        cls,
        address: Address,
        invitation: Invitation,
        watch: Watch,
        begin: Begin[M],
        hears: bool = True,
    ) -> Connection[M]:
        """To an entrance; whoever does not hear must not be sent anything.

        Raises OSError where there can be no connection.
        """
        made = cls(_new_socket(address), watch, begin)
        made._seal(invitation.key, OUTWARD, INWARD)
        made._parts = iter([[invitation.ticket]])
        made.taken_bytes = len(invitation.ticket)
        made._received = made._messages()
        try:
            with suppress(BlockingIOError):
                made._socket.connect(address if isinstance(address, tuple) else str(address))
            if isinstance(address, tuple):
                _fit(made._socket, address[0])
        except OSError:
            made._socket.close()
            raise
        made._want(_READ | _WRITE if hears else _WRITE)
        return made

    @classmethod
    def accepted(
        cls, taken: socket.socket, watch: Watch, begin: Begin[M], admit: Admit[M], ahead: bool
    ) -> Connection[M]:
        """By an entrance."""
        configure(taken)
        if taken.family != socket.AF_UNIX:
            with suppress(OSError):  # it ended already
                _fit(taken, taken.getpeername()[0])
        made = cls(taken, watch, begin, ahead)
        made._received = made._after_ticket(admit)
        made._want(_READ)
        return made

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting(self) -> int:
        """Messages of which nothing has been sent yet."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """All has been sent."""
        return not self._waiting and not self._unsent

    @property
    def is_leaving(self) -> bool:
        """Not all that was sent is at the other end, and more of it keeps getting there."""
        return self._has_left_over and not self._stands_still[0]

    @property
    def is_arriving(self) -> bool:
        """Of a payload the beginning has come, and more keeps coming."""
        return self._is_within and not self._stands_still[1]

    @property
    def acknowledged_bytes(self) -> int:
        """Of what was sent; in time it gets to `taken_bytes`."""
        return self.sent_bytes - self._unacknowledged

    def tick(self, now: float) -> None:
        """To be called again and again: what has not moved since the last time stands still."""
        if now - self._judged_at < JUDGE_EVERY_S:
            return
        self._judged_at, before = now, self._moved
        moved = self._moved = self.acknowledged_bytes, self.received_bytes
        self._stands_still = (
            self._has_left_over and moved[0] == before[0],
            self._is_within and moved[1] == before[1],
        )

    def send(self, frames: Sequence[Frame]) -> None:
        """A header, or a header and a payload, which is not copied and must not be changed after.

        The header has 1 to `HEADER_LIMIT_BYTES` bytes, a payload `LARGEST_BYTES` at most.
        """
        self._waiting.append(frames)
        self.taken_bytes += self._travelling_bytes(*frames)
        self.flush()

    def flush(self) -> None:
        """Writes what can be written now."""
        if self.is_open and self.is_idle:
            return
        try:
            while self._unsent or self._begin_next():
                sent = self._socket.sendmsg(self._unsent)
                self.sent_bytes += sent
                self._unsent = _rest(self._unsent, sent)
        except BlockingIOError:
            self._want(self._events | _WRITE)
        except OSError as error:
            raise Broken(str(error)) from None

    @property
    def has_come(self) -> bool:
        """Something that follows the last message is here already."""
        return len(self._came) > 0

    def receive(self) -> M | None:
        """A message that came whole, or None: then nothing more is there until the next look.

        Raises Malformed for one that is none; others may follow it.
        """
        if not self._came and not self._watch.is_readable(self.fileno()):
            return None
        received = next(self._received)
        if isinstance(received, Malformed):
            raise received
        return received

    @property
    def hears(self) -> bool:
        return bool(self._events & _READ)

    def hear(self, hears: bool) -> None:
        """Whether `receive` is going to be called when something comes."""
        if self.fileno() >= 0:
            self._want(self._events | _READ if hears else self._events & ~_READ)

    def close(self) -> None:
        self._want(0)
        self._socket.close()

    def _seal(self, key: bytes, outward: int, inward: int) -> None:
        if key:
            self._outward, self._inward = Seal(key, outward), Seal(key, inward)
            self._sealed_out = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
            self._sealed_in = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
            self._piece = memoryview(bytearray(RECORD_BYTES))

    def _want(self, events: int) -> None:
        if events != self._events:
            self._watch.register(self._socket, events)  # which, with 0, unregisters
            self._events = events

    @property
    def _has_left_over(self) -> bool:
        return not self.is_idle or self._unacknowledged > 0

    @property
    def _unacknowledged(self) -> int:
        """Bytes that the kernel has taken, and the other end's has not; of a link that is slow it
        may be seconds' worth."""
        left = array("i", [0])
        if self.fileno() >= 0:
            with suppress(OSError):  # a kernel that does not tell
                ioctl(self._socket, TIOCOUTQ, left)
        return left[0]

    # --- sending ----------------------------------------------------------------------------

    def _begin_next(self) -> bool:
        """The next part is what is to be sent; False when there is none."""
        while (part := next(self._parts, None)) is None:
            self.is_open = True
            if not self._waiting:
                self._want(self._events & ~_WRITE)
                return False
            self._parts = self._message(*self._waiting.popleft())
        self._unsent = part
        return True

    def _travelling_bytes(self, header: Frame, *payloads: Frame) -> int:
        """How long the message is as it travels."""
        payload_bytes = sum(len(payload) for payload in payloads)
        plain = _PREFIX.size + len(header) + payload_bytes
        if self._outward is None:
            return plain
        return plain + TAG_BYTES * (2 + -(-payload_bytes // RECORD_BYTES))

    def _message(self, header: Frame, *payloads: Frame) -> Iterator[list[Frame]]:
        """A message as it travels, part by part; each is sent before the next is made."""
        payload = memoryview(payloads[0] if payloads else b"")
        prefix = _PREFIX.pack(1 + len(payloads), len(header), len(payload))
        seal = self._outward
        if seal is None:
            yield [prefix, header, payload]
            return
        head = memoryview(bytearray(len(prefix) + len(header) + 2 * TAG_BYTES))
        seal.close(prefix, head[: len(prefix) + TAG_BYTES])
        seal.close(header, head[len(prefix) + TAG_BYTES :])
        yield [head]
        for start in range(0, len(payload), RECORD_BYTES):
            record = payload[start : start + RECORD_BYTES]
            sealed = self._sealed_out[: len(record) + TAG_BYTES]
            seal.close(record, sealed)
            yield [sealed]

    # --- receiving --------------------------------------------------------------------------

    def _after_ticket(self, admit: Admit[M]) -> Iterator[M | Malformed | None]:
        ticket = memoryview(bytearray(TICKET_BYTES))
        yield from self._fill(ticket)
        self.name, key = admit(self, bytes(ticket))
        self._seal(key, INWARD, OUTWARD)
        self.is_open = True
        yield from self._messages()

    def _messages(self) -> Iterator[M | Malformed | None]:
        prefix = memoryview(bytearray(_PREFIX.size))
        while True:
            yield from self._part(prefix)
            frames, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
            is_possible = 0 < header_bytes <= HEADER_LIMIT_BYTES
            if not is_possible or payload_bytes > LARGEST_BYTES:
                raise Broken("a message as long as none may be")
            header = memoryview(bytearray(header_bytes))
            yield from self._part(header)
            message: M | Malformed
            try:
                if frames not in (1, 2):
                    raise Malformed(f"a message of {frames} frames")
                message, target = self._begin(bytes(header), payload_bytes if frames == 2 else None)
                if isinstance(target, memoryview) and len(target) != payload_bytes:
                    raise Malformed(f"a payload of {payload_bytes} bytes where none belongs")
            except Malformed as error:  # what follows it can be read all the same
                message, target = error, _drop
            self._is_within = True
            if isinstance(target, memoryview):
                yield from self._part(target)
            else:
                yield from self._pieces(payload_bytes, target)
            self._is_within = False
            yield message
            del message, target  # so that the next one can come into the same memory

    def _part(self, part: memoryview) -> Iterator[None]:
        if self._inward is None:
            yield from self._fill(part)
            return
        for start in range(0, len(part), RECORD_BYTES):
            record = part[start : start + RECORD_BYTES]
            plain = self._piece[: len(record)]
            yield from self._record(self._inward, plain)
            record[:] = plain  # what is not what was sent must not get where others may read it

    def _pieces(self, size: int, take: Take) -> Iterator[None]:
        if not len(self._piece):
            self._piece = memoryview(bytearray(PIECE_BYTES))
        for start in range(0, size, len(self._piece)):
            piece = self._piece[: size - start]
            if self._inward is None:
                yield from self._fill(piece)
            else:
                yield from self._record(self._inward, piece)
            take(start, piece)

    def _record(self, seal: Seal, plain: memoryview) -> Iterator[None]:
        sealed = self._sealed_in[: len(plain) + TAG_BYTES]
        yield from self._fill(sealed)
        try:
            seal.open(sealed, plain)
        except Forged as error:
            raise Broken(str(error)) from None

    def _fill(self, part: memoryview) -> Iterator[None]:
        while len(part):
            if self._came:
                came, self._came = self._came[: len(part)], self._came[len(part) :]
                part[: len(came)] = came
                part = part[len(came) :]
                continue
            is_ahead = len(part) < len(self._ahead)
            if is_ahead and not self._watch.is_readable(self.fileno()):
                yield None
                continue
            try:
                size = self._socket.recv_into(self._ahead if is_ahead else part)
            except BlockingIOError:
                self._watch.found_empty(self.fileno())
                yield None
                continue
            except OSError as error:
                raise Broken(str(error)) from None
            if not size:
                raise Broken("the other end has closed it")
            self.received_bytes += size
            if is_ahead:
                self._came = self._ahead[:size]
                if size < len(self._ahead):  # there is no more: not to be found out by another call
                    self._watch.found_empty(self.fileno())
            else:
                part = part[size:]


def _drop(start: int, piece: memoryview) -> None:
    pass


def are_unix_sockets_fast() -> bool:
    """Whether the kernel allows buffers of `UNIX_BUFFER_BYTES`; for TCP it adapts them itself."""
    with socket.socket(socket.AF_UNIX) as tried:
        configure(tried)
        # which tells twice as much as was asked for, the rest being for the kernel's own use
        return tried.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * UNIX_BUFFER_BYTES


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _new_socket(address: Address) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, Path) else family_of(address[0])
    made = socket.socket(family, socket.SOCK_STREAM)
    configure(made)
    return made


def configure(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)


def _fit(connection: socket.socket, other: str) -> None:
    """Whoever has one address with this end is on the same host."""
    if connection.getsockname()[0] == other:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, HOST_BUFFER_BYTES)


def _rest(frames: list[Frame], sent: int) -> list[Frame]:
    """What is left of them after the first `sent` bytes."""
    for index, frame in enumerate(frames):
        if sent < len(frame):
            return [memoryview(frame)[sent:], *frames[index + 1 :]]
        sent -= len(frame)
    return []
