"""Messages over a connection of our own, beside ZeroMQ's: for what is large.

ZeroMQ receives in a thread of its own, into memory that has left the processor's cache when the
message is whole. Here the one thread that adds also receives, and adds piece by piece what has just
come; a total can be received where it is to lie.

Whoever listens gives out tickets (`entrance.py`), over a connection that is authenticated. One
connection can be opened with each; it begins with the ticket and goes on with messages, both ways
(`framing.py`). If the ticket comes with a key, they are sealed.

All of it is owned by one thread and never waits. Not here: what the frames hold (`wire.py`), where
a payload is to lie, and whom to give a ticket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic

import zmq

from p2p.transport.framing import BARE, BEGINS, ENDS, GOES_ON, WHOLE, Begin, Broken, M
from p2p.transport.incoming import Coming, Incoming, Reading
from p2p.transport.outgoing import Outgoing
from p2p.transport.pipe import Pipe
from p2p.transport.sealing import INWARD, OUTWARD, TICKET_BYTES, Invitation, Seal
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, Malformed

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

Address = tuple[str, int] | Path
"""An IP address and a port, or a Unix socket."""
Admit = Callable[["Connection[M]", bytes], tuple[bytes, bytes]]
"""Whose ticket it is that a connection shows, and its key. Raises Broken for one of no use."""


class Connection(Generic[M]):
    """Either end of one. Whatever raises Broken has to be followed by `close`.

    If it reads `ahead`, `receive` has to be called until it returns None, or again without waiting.
    """

    def __init__(
        self,
        connected: socket.socket,
        watch: Watch,
        begin: Begin[M],
        reading: Reading,
        ticket: bytes = b"",
    ) -> None:
        """`ticket`: that it shows."""
        self.name = b""
        """Of whoever showed a ticket here."""
        self.since: float | None = None
        """When it was first seen without one; the entrance's."""
        self._socket = connected
        self._watch = watch
        self._events = 0
        self._incoming = Incoming(connected, watch, begin, reading)
        self._outgoing = Outgoing(connected, ticket)
        self._judged_at = -float("inf")
        self._judged_bytes = 0
        """What had come to the other end then."""
        self._stands_still = False
        """It was no more than before, though it should."""
        connected.setblocking(False)

    @classmethod
    def dialled(
        cls,
        address: Address,
        invitation: Invitation,
        watch: Watch,
        begin: Begin[M],
        reading: Reading | None,
    ) -> Connection[M]:
        """To an entrance; without `reading` it hears nothing, and must not be sent anything.

        Raises OSError where there can be no connection.
        """
        made = cls(_new_socket(address), watch, begin, reading or Reading(), invitation.ticket)
        made._seal(invitation.key, OUTWARD, INWARD)
        try:
            with suppress(BlockingIOError):
                made._socket.connect(address if isinstance(address, tuple) else str(address))
            if isinstance(address, tuple):
                _fit(made._socket, address[0])
        except OSError:
            made._socket.close()
            raise
        made._want(_WRITE if reading is None else _READ | _WRITE)
        return made

    @classmethod
    def accepted(
        cls,
        taken: socket.socket,
        watch: Watch,
        begin: Begin[M],
        admit: Admit[M],
        reading: Reading,
    ) -> Connection[M]:
        """By an entrance."""
        configure(taken)
        if taken.family != socket.AF_UNIX:
            with suppress(OSError):  # it ended already
                _fit(taken, taken.getpeername()[0])
        made = cls(taken, watch, begin, reading)
        made._expect_ticket(admit)
        made._want(_READ)
        return made

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_open(self) -> bool:
        """The ticket was shown, so messages can be sent."""
        return self._outgoing.is_open

    @property
    def waiting(self) -> int:
        """Messages of which nothing has been sent yet."""
        return self._outgoing.waiting

    @property
    def is_idle(self) -> bool:
        """All has been sent."""
        return self._outgoing.is_idle

    @property
    def is_leaving(self) -> bool:
        """Not all that was sent is at the other end, and more of it keeps getting there."""
        return self._has_left_over and not self._stands_still

    @property
    def coming(self) -> Coming[M] | None:
        """Whose payload is just being received, or a part of it."""
        return self._incoming.coming

    @property
    def arriving(self) -> list[M]:
        """The messages of which the beginning has come, and more keeps coming."""
        return self._incoming.arriving

    @property
    def taken_bytes(self) -> int:
        """What this end was given to send,"""
        return self._outgoing.taken_bytes

    @property
    def sent_bytes(self) -> int:
        """what of it the kernel has,"""
        return self._outgoing.sent_bytes

    @property
    def acknowledged_bytes(self) -> int:
        """and what the other end's has."""
        return self.sent_bytes - self._outgoing.unacknowledged

    def tick(self, now: float) -> None:
        """To be called again and again: what has not moved since the last time stands still."""
        if now - self._judged_at < JUDGE_EVERY_S:
            return
        before, self._judged_bytes = self._judged_bytes, self.acknowledged_bytes
        self._stands_still = self._has_left_over and self._judged_bytes == before
        self._judged_at = now
        self._incoming.tick(now)

    def send(self, frames: Sequence[Frame]) -> None:
        """A header, or a header and a payload, which is not copied and must not be changed after.

        The header has 1 to `HEADER_LIMIT_BYTES` bytes, a payload `LARGEST_BYTES` at most.
        """
        header, *payloads = frames
        payload = payloads[0] if payloads else b""
        self._send(WHOLE if payloads else BARE, 0, header, payload, len(payload))

    def send_beginning(self, channel: int, header: Frame, size: int) -> None:
        """Of a message with a payload of so many bytes; `send_part` sends them, or `send_end` ends
        it without."""
        self._send(BEGINS, channel, header, b"", size)

    def send_part(self, channel: int, payload: Frame | Pipe) -> None:
        """The next bytes of the payload of the message that began in this channel.

        Nothing may be put into a pipe before it is empty, and where parts are sealed there is none.
        """
        self._send(GOES_ON, channel, b"", payload, len(payload))

    def send_end(self, channel: int) -> None:
        """The rest of the message that began in this channel does not come."""
        self._send(ENDS, channel, b"", b"", 0)

    def replace_pipe(self, pipe: Pipe, rest: memoryview) -> None:
        """By what was left in it, if it is a part that has not been sent whole."""
        self._outgoing.replace_pipe(pipe, rest)

    def flush(self) -> None:
        """Writes what had to wait, if the last look found room for it."""
        if self._events & _WRITE and self._watch.is_writable(self._socket.fileno()):
            self._write()

    @property
    def has_come(self) -> bool:
        """Something that follows the last message is here already."""
        return self._incoming.has_come

    def receive(self) -> M | None:
        """A message that came whole, or None: then nothing more is there until the next look.

        Raises Malformed for one that is none; others may follow it.
        """
        if not self._incoming.has_come and not self._watch.is_readable(self._socket.fileno()):
            return None
        received = self._incoming.receive()
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
        self._incoming.forget()

    def _seal(self, key: bytes, outward: int, inward: int) -> None:
        if key:
            self._outgoing.seal(Seal(key, outward))
            self._incoming.seal(Seal(key, inward))

    def _send(
        self, kind: int, channel: int, header: Frame, payload: Frame | Pipe, size: int
    ) -> None:
        self._outgoing.add(kind, channel, header, payload, size)
        if not self._events & _WRITE:  # else something waits for room
            self._write()

    def _write(self) -> None:
        try:
            is_all = self._outgoing.flush()
        except OSError as error:
            raise Broken(str(error)) from None
        self._watch.found_full(self._socket.fileno())
        self._want(self._events & ~_WRITE if is_all else self._events | _WRITE)

    def _want(self, events: int) -> None:
        if events != self._events:
            self._watch.register(self._socket, events)  # which, with 0, unregisters
            self._events = events

    @property
    def _has_left_over(self) -> bool:
        return not self.is_idle or self._outgoing.unacknowledged > 0

    def _expect_ticket(self, admit: Admit[M]) -> None:
        ticket = memoryview(bytearray(TICKET_BYTES))

        def shown() -> bool:
            self.name, key = admit(self, bytes(ticket))
            self._seal(key, INWARD, OUTWARD)
            self._outgoing.is_open = True
            return self._incoming.expect_message()

        self._incoming.expect(ticket, shown)


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
