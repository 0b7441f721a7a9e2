"""Messages over a connection of our own, beside ZeroMQ's: for what is large.

ZeroMQ receives in a thread of its own, into memory that has left the processor's cache when the
message is whole. Here the one thread that adds also receives, and what it adds was just written;
a total can be received where it is to lie.

Whoever listens gives out tickets (`Entrance.invite`), over a connection that is authenticated. One
connection can be opened with each; it begins with the ticket and goes on with messages, both ways:

    number of frames: 1 byte | length of the header, of the payload: 4 bytes each, little-endian
    header | payload

If the entrance seals, the ticket comes with a key, and each of these parts, of the payload every
`RECORD_BYTES`, is sealed with AES-256-GCM (NIST SP 800-38D); the nonce is the direction and a
count. So whoever changes, repeats, reorders or leaves out anything breaks the connection.

All of it is owned by one thread and never waits. Not here: what the frames hold (`wire.py`), where
a payload is to lie, and whom to give a ticket.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import zmq
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2p.transport.wire import PAYLOAD_LIMIT_BYTES, Frame, Malformed

RECORD_BYTES = 256 << 10
"""What is sealed or opened at once; both copies of it fit into a core's cache."""
HEADER_LIMIT_BYTES = 64 << 10
TAG_BYTES, KEY_BYTES, TICKET_BYTES = 16, 32, 16
TICKETS_LIMIT = 1024
"""Of those that nobody has shown yet the oldest counts no more."""
STRANGERS_LIMIT = 64
"""Connections that have not shown a ticket yet; beyond that the oldest is closed,"""
STRANGERS_S = 5.0
"""and after this time."""
SILENCE_MS = 5000
"""A connection ends when so long nothing of what was sent is acknowledged."""
UNIX_BUFFER_BYTES = 2 << 20
"""With less, a large message takes so many wake-ups that ZeroMQ is faster."""
_READ, _WRITE = int(zmq.POLLIN), int(zmq.POLLOUT)
_PREFIX = struct.Struct("<BII")
_NONCE = struct.Struct("<IQ")
_INVITATION = struct.Struct(f"<H{TICKET_BYTES}s")

M = TypeVar("M")
Begin = Callable[[list[Frame]], tuple[M, memoryview]]
"""Makes a message of its header and of memory as long as its payload, if it has one, which is yet
to come; says where that is to be written. Raises Malformed."""
Address = tuple[str, int] | Path
"""An IP address and a port, or a Unix socket."""


class Broken(Exception):
    """The connection came to its end."""


class Invitation(NamedTuple):
    """What a connection can be opened with, once."""

    port: int
    """0 where there are Unix sockets only."""
    ticket: bytes
    key: bytes
    """Empty where nothing is sealed."""

    def to_bytes(self) -> bytes:
        return _INVITATION.pack(self.port, self.ticket) + self.key

    @classmethod
    def from_bytes(cls, data: Frame) -> Invitation:
        """Raises ValueError."""
        if len(data) not in (_INVITATION.size, _INVITATION.size + KEY_BYTES):
            raise ValueError(f"an invitation of {len(data)} bytes")
        port, ticket = _INVITATION.unpack_from(data)
        return cls(port, ticket, bytes(data[_INVITATION.size :]))


class _Seal:
    """One direction of one connection."""

    def __init__(self, key: bytes, direction: int) -> None:
        self.sealed = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
        self.plain = memoryview(bytearray(RECORD_BYTES))
        self._cipher = AESGCM(key)
        self._direction = direction
        self._count = 0

    def close(self, plain: Frame, sealed: memoryview) -> None:
        self._cipher.encrypt_into(self._nonce(), plain, None, sealed)

    def open(self, sealed: memoryview, plain: memoryview) -> None:
        try:
            self._cipher.decrypt_into(self._nonce(), sealed, None, plain)
        except InvalidTag:
            raise Broken("what arrived is not what was sealed") from None

    def _nonce(self) -> bytes:
        self._count += 1
        return _NONCE.pack(self._direction, self._count)


class Connection(Generic[M]):
    """Either end of one. Whatever raises Broken has to be followed by `close`."""

    def __init__(self, connected: socket.socket, poller: zmq.Poller, begin: Begin[M]) -> None:
        self.name = b""
        """Of whoever showed a ticket here."""
        self.since: float | None = None
        """When it was first seen without one; the entrance's."""
        self.is_open = False
        """The ticket was shown, so messages can be sent."""
        self.sent_bytes = 0
        self._socket = connected
        self._poller = poller
        self._begin = begin
        self._events = 0
        self._outward: _Seal | None = None
        self._inward: _Seal | None = None
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
        poller: zmq.Poller,
        begin: Begin[M],
        hears: bool = True,
    ) -> Connection[M]:
        """To an entrance; whoever does not hear must not be sent anything.

        Raises OSError where there can be no connection.
        """
        made = cls(_new_socket(address), poller, begin)
        made._seal(invitation.key, 0, 1)
        made._parts = iter([[invitation.ticket]])
        made._received = made._messages()
        try:
            with suppress(BlockingIOError):
                made._socket.connect(address if isinstance(address, tuple) else str(address))
        except OSError:
            made._socket.close()
            raise
        made._watch(_READ | _WRITE if hears else _WRITE)
        return made

    @classmethod
    def accepted(
        cls, taken: socket.socket, poller: zmq.Poller, entrance: Entrance[M]
    ) -> Connection[M]:
        """By an entrance, which is asked for the ticket."""
        made = cls(taken, poller, entrance.begin)
        made._received = made._after_ticket(entrance)
        made._watch(_READ)
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

    def send(self, frames: Sequence[Frame]) -> None:
        """A header, or a header and a payload, which is not copied and must not be changed after.

        The header has 1 to `HEADER_LIMIT_BYTES` bytes.
        """
        self._waiting.append(frames)
        self.flush()

    def flush(self) -> None:
        """Writes what can be written now."""
        try:
            while self._unsent or self._begin_next():
                sent = self._socket.sendmsg(self._unsent)
                self.sent_bytes += sent
                self._unsent = _rest(self._unsent, sent)
        except BlockingIOError:
            self._watch(self._events | _WRITE)
        except OSError as error:
            raise Broken(str(error)) from None

    def receive(self) -> M | None:
        """A message that came whole, or None.

        Raises Malformed for one that is none; others may follow it.
        """
        received = next(self._received)
        if isinstance(received, Malformed):
            raise received
        return received

    def hear(self, hears: bool) -> None:
        """Whether `receive` is going to be called when something comes."""
        if self.fileno() >= 0:
            self._watch(self._events | _READ if hears else self._events & ~_READ)

    def close(self) -> None:
        self._watch(0)
        self._socket.close()

    def _seal(self, key: bytes, outward: int, inward: int) -> None:
        if key:
            self._outward, self._inward = _Seal(key, outward), _Seal(key, inward)

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._poller.register(self._socket, events)  # which, with 0, unregisters
            self._events = events

    # --- sending ----------------------------------------------------------------------------

    def _begin_next(self) -> bool:
        """The next part is what is to be sent; False when there is none."""
        while (part := next(self._parts, None)) is None:
            self.is_open = True
            if not self._waiting:
                self._watch(self._events & ~_WRITE)
                return False
            self._parts = self._message(*self._waiting.popleft())
        self._unsent = part
        return True

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
            sealed = seal.sealed[: len(record) + TAG_BYTES]
            seal.close(record, sealed)
            yield [sealed]

    # --- receiving --------------------------------------------------------------------------

    def _after_ticket(self, entrance: Entrance[M]) -> Iterator[M | Malformed | None]:
        ticket = memoryview(bytearray(TICKET_BYTES))
        yield from self._fill(ticket)
        self.name, key = entrance.admit(self, bytes(ticket))
        self._seal(key, 1, 0)
        self.is_open = True
        yield from self._messages()

    def _messages(self) -> Iterator[M | Malformed | None]:
        prefix = memoryview(bytearray(_PREFIX.size))
        while True:
            yield from self._part(prefix)
            frames, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
            is_possible = 0 < header_bytes <= HEADER_LIMIT_BYTES
            if not is_possible or payload_bytes > PAYLOAD_LIMIT_BYTES:
                raise Broken("a message as long as none may be")
            header = memoryview(bytearray(header_bytes))
            yield from self._part(header)
            memory = np.empty(payload_bytes, np.uint8).data
            message: M | Malformed
            try:
                begun: list[Frame] = [header.tobytes(), memory]
                message, place = self._begin(begun[:frames])
                if len(place) != payload_bytes:
                    raise Malformed(f"a payload of {payload_bytes} bytes where none belongs")
            except Malformed as error:  # what follows it can be read all the same
                message, place = error, memory
            yield from self._part(place)
            yield message

    def _part(self, part: memoryview) -> Iterator[None]:
        seal = self._inward
        if seal is None:
            yield from self._fill(part)
            return
        for start in range(0, len(part), RECORD_BYTES):
            record = part[start : start + RECORD_BYTES]
            sealed, plain = seal.sealed[: len(record) + TAG_BYTES], seal.plain[: len(record)]
            yield from self._fill(sealed)
            seal.open(sealed, plain)
            record[:] = plain  # what is not what was sent must not get where others may read it

    def _fill(self, part: memoryview) -> Iterator[None]:
        while len(part):
            try:
                size = self._socket.recv_into(part)
            except BlockingIOError:
                yield None
                continue
            except OSError as error:
                raise Broken(str(error)) from None
            if not size:
                raise Broken("the other end has closed it")
            part = part[size:]


class Entrance(Generic[M]):
    """Where connections come in, at `addresses`; those with a port have the same one.

    A port of 0 is any that is free. Raises OSError when it cannot listen there.
    """

    def __init__(
        self, addresses: Sequence[Address], poller: zmq.Poller, seals: bool, begin: Begin[M]
    ) -> None:
        self.begin = begin
        self.connections: dict[int, Connection[M]] = {}
        """By their descriptors,"""
        self.named: dict[bytes, Connection[M]] = {}
        """and by whose they are."""
        self._refused = 0
        self._poller = poller
        self._seals = seals
        self._tickets: dict[bytes, tuple[bytes, bytes]] = {}
        """Whose they are, and the key."""
        self._files: list[tuple[Path, int]] = []
        self._listeners: list[socket.socket] = []
        self._port = 0
        try:
            for address in addresses:
                self._listen(address)
        except OSError:
            self.close()
            raise

    def invite(self, name: bytes) -> Invitation:
        """Whoever has this name; what it was given before counts no more."""
        self._forget(lambda each: each == name)
        key = secrets.token_bytes(KEY_BYTES) if self._seals else b""
        invitation = Invitation(self._port, secrets.token_bytes(TICKET_BYTES), key)
        if len(self._tickets) >= TICKETS_LIMIT:
            del self._tickets[next(iter(self._tickets))]
        self._tickets[invitation.ticket] = name, key
        self._accept_on_demand()
        return invitation

    def admit(self, connection: Connection[M], ticket: bytes) -> tuple[bytes, bytes]:
        """Whose ticket it is, and its key; an older connection of the same name ends.

        Raises Broken for a ticket that does not count.
        """
        name, key = self._tickets.pop(ticket, (b"", b""))
        if not name:
            raise Broken("no ticket")
        self._accept_on_demand()
        if (older := self.named.get(name)) is not None:
            self.end(older)
        self.named[name] = connection
        return name, key

    def accept(self) -> None:
        """Lets in who waits, if anybody is expected."""
        for listener in self._listeners if self._tickets else ():
            with suppress(OSError):  # none waits, or it went away, or there are too many open files
                while True:
                    taken, _ = listener.accept()
                    _configure(taken)
                    made = Connection.accepted(taken, self._poller, self)
                    self.connections[made.fileno()] = made
                    strangers = [each for each in self.connections.values() if not each.name]
                    if len(strangers) > STRANGERS_LIMIT:
                        self.end(strangers[0])

    def receive(self, connection: Connection[M]) -> M | None:
        """What came from it; ends it when it is broken. Raises Malformed."""
        try:
            return connection.receive()
        except Broken:
            self.end(connection)
            return None

    def end(self, connection: Connection[M]) -> None:
        if self.connections.pop(connection.fileno(), None) is None:
            return
        if self.named.get(connection.name) is connection:
            del self.named[connection.name]
        self._refused += not connection.name
        connection.close()

    def taken_refused(self) -> int:
        """How many connections had no ticket that counts, since this was last asked."""
        refused, self._refused = self._refused, 0
        return refused

    def keep(self, names: Collection[bytes]) -> None:
        """Nothing more from all others."""
        self._forget(lambda each: each not in names)
        for name in [name for name in self.named if name not in names]:
            self.end(self.named[name])

    def tick(self, now: float) -> None:
        for each in [each for each in self.connections.values() if not each.name]:
            each.since = now if each.since is None else each.since
            if now - each.since > STRANGERS_S:
                self.end(each)

    def close(self) -> None:
        for each in [*self.connections.values()]:
            self.end(each)
        self._forget(lambda each: True)
        for listener in self._listeners:
            listener.close()
        for file, inode in self._files:
            with suppress(FileNotFoundError):
                if file.stat().st_ino == inode:  # no successor's
                    file.unlink()

    def _listen(self, address: Address) -> None:
        if isinstance(address, Path):
            address.unlink(missing_ok=True)  # of a former process
            listener = socket.socket(socket.AF_UNIX)
            self._listeners.append(listener)
            listener.bind(str(address))
            self._files.append((address, address.stat().st_ino))
            listener.listen(STRANGERS_LIMIT)
        else:
            listener = socket.create_server(
                (address[0], self._port or address[1]),
                family=_family(address[0]),
                backlog=STRANGERS_LIMIT,
            )
            self._listeners.append(listener)
            self._port = listener.getsockname()[1]
        listener.setblocking(False)

    def _forget(self, is_forgotten: Callable[[bytes], bool]) -> None:
        self._tickets = {
            ticket: (name, key)
            for ticket, (name, key) in self._tickets.items()
            if not is_forgotten(name)
        }
        self._accept_on_demand()

    def _accept_on_demand(self) -> None:
        for listener in self._listeners:
            self._poller.register(listener, _READ if self._tickets else 0)


def are_unix_sockets_fast() -> bool:
    """Whether the kernel allows buffers of `UNIX_BUFFER_BYTES`; for TCP it adapts them itself."""
    with socket.socket(socket.AF_UNIX) as tried:
        _configure(tried)
        # which tells twice as much as was asked for, the rest being for the kernel's own use
        return tried.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * UNIX_BUFFER_BYTES


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _new_socket(address: Address) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, Path) else _family(address[0])
    made = socket.socket(family, socket.SOCK_STREAM)
    _configure(made)
    return made


def _configure(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)


def _rest(frames: list[Frame], sent: int) -> list[Frame]:
    """What is left of them after the first `sent` bytes."""
    for index, frame in enumerate(frames):
        if sent < len(frame):
            return [memoryview(frame)[sent:], *frames[index + 1 :]]
        sent -= len(frame)
    return []
