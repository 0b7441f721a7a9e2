"""Messages over a TCP connection of our own, one way: for links that carry much (`direct.py`).

ZeroMQ receives in a thread of its own, into memory that has left the processor's cache when the
message is whole. Here the one thread that adds also receives, and what it adds was just written.

Whoever listens gives out tickets (`Entrance.invite`), over a connection that is authenticated. One
connection can be opened with each; it begins with the ticket and goes on with messages:

    number of frames: 1 byte | length of the header, of the payload: 4 bytes each, little-endian
    header | payload

If the entrance seals, the ticket comes with a key, and each of these parts, of the payload every
`RECORD_BYTES`, is sealed with AES-256-GCM (NIST SP 800-38D); the nonce counts from 1. So whoever
changes, repeats, reorders or leaves out anything breaks the connection.

All of it is owned by one thread and never waits. Not here: what the frames hold (`wire.py`), where
a payload is to lie, and whom to give a ticket.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import zmq
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fault.records import Peer
from p2p.messages import Message
from p2p.transport.link import BULK_LIMIT_MESSAGES
from p2p.transport.wire import PAYLOAD_LIMIT_BYTES, Frame, Malformed

RECORD_BYTES = 256 << 10
"""What is sealed or opened at once; both copies of it fit into a core's cache."""
HEADER_LIMIT_BYTES = 64 << 10
TAG_BYTES, KEY_BYTES, NONCE_BYTES = 16, 32, 12
TICKET_BYTES = 16
STRANGERS_LIMIT = 64
"""Connections that have not shown a ticket yet; beyond that the oldest is closed,"""
STRANGERS_S = 5.0
"""and after this time."""
SILENCE_MS = 5000
"""A connection ends when so long nothing of what was sent is acknowledged."""
_PREFIX = struct.Struct("<BII")
_INVITATION = struct.Struct(f"<H{TICKET_BYTES}s")


Begin = Callable[[list[Frame]], Message]
"""Makes a message of a header and of memory as long as its payload, which is yet to come. It will
be written where the message says that it is. Raises Malformed."""


class Broken(Exception):
    """The connection came to its end."""


class Invitation(NamedTuple):
    """What a connection can be opened with, once."""

    port: int
    ticket: bytes
    key: bytes
    """Empty where nothing is sealed."""

    def to_bytes(self) -> bytes:
        return _INVITATION.pack(self.port, self.ticket) + self.key

    @classmethod
    def from_bytes(cls, data: bytes) -> Invitation:
        """Raises ValueError."""
        if len(data) not in (_INVITATION.size, _INVITATION.size + KEY_BYTES):
            raise ValueError(f"an invitation of {len(data)} bytes")
        port, ticket = _INVITATION.unpack_from(data)
        return cls(port, ticket, data[_INVITATION.size :])


class _Seal:
    """One end of one way."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
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
        return self._count.to_bytes(NONCE_BYTES, "little")


class Outbound:
    """The sending end, connecting to `host` (an IP address).

    Raises OSError where there can be no connection. All else raises Broken when it has ended.
    """

    def __init__(self, host: str, invitation: Invitation, poller: zmq.Poller) -> None:
        self.is_open = False
        """It is connected, and the ticket shown."""
        self._poller = poller
        self._seal = _Seal(invitation.key) if invitation.key else None
        self._sealed = memoryview(bytearray(RECORD_BYTES + TAG_BYTES)) if invitation.key else None
        self._waiting: deque[Sequence[Frame]] = deque()
        self._parts: Iterator[list[Frame]] = iter([[invitation.ticket]])
        self._unsent: list[Frame] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        _configure(self._socket)
        with suppress(BlockingIOError):
            self._socket.connect((host, invitation.port))
        poller.register(self._socket, zmq.POLLOUT)

    def send(self, frames: Sequence[Frame]) -> bool:
        """A header, or a header and a payload, which is not copied and must not be changed after.

        False when there is no room, or the header is longer than `HEADER_LIMIT_BYTES`.
        """
        if len(self._waiting) >= BULK_LIMIT_MESSAGES or len(frames[0]) > HEADER_LIMIT_BYTES:
            return False
        self._waiting.append(frames)
        self.flush()
        return True

    def flush(self) -> None:
        """Writes what can be written now."""
        try:
            while self._unsent or self._begin_next():
                sent = self._socket.sendmsg(self._unsent)
                self._unsent = _rest(self._unsent, sent)
        except BlockingIOError:
            self._poller.register(self._socket, zmq.POLLOUT)
        except OSError as error:
            raise Broken(str(error)) from None

    def close(self) -> None:
        if self._socket in self._poller:
            self._poller.unregister(self._socket)
        self._socket.close()

    def _begin_next(self) -> bool:
        """The next part is what is to be sent; False when there is none."""
        while (part := next(self._parts, None)) is None:
            self.is_open = True
            if not self._waiting:
                if self._socket in self._poller:
                    self._poller.unregister(self._socket)
                return False
            self._parts = self._message(*self._waiting.popleft())
        self._unsent = part
        return True

    def _message(self, header: Frame, *payloads: Frame) -> Iterator[list[Frame]]:
        """A message as it travels, part by part; each is sent before the next is made."""
        payload = memoryview(payloads[0] if payloads else b"")
        prefix = _PREFIX.pack(1 + len(payloads), len(header), len(payload))
        if self._seal is None or self._sealed is None:
            yield [prefix, header, payload]
            return
        head = memoryview(bytearray(len(prefix) + len(header) + 2 * TAG_BYTES))
        self._seal.close(prefix, head[: len(prefix) + TAG_BYTES])
        self._seal.close(header, head[len(prefix) + TAG_BYTES :])
        yield [head]
        for start in range(0, len(payload), RECORD_BYTES):
            record = payload[start : start + RECORD_BYTES]
            sealed = self._sealed[: len(record) + TAG_BYTES]
            self._seal.close(record, sealed)
            yield [sealed]


class _Inbound:
    """The receiving end of a connection that has come to the entrance."""

    def __init__(self, accepted: socket.socket, entrance: Entrance) -> None:
        self.socket = accepted
        self.peer: Peer | None = None
        """Who shows whose ticket."""
        self.since: float | None = None
        """When it was first seen without one."""
        self._entrance = entrance
        self._seal: _Seal | None = None
        self._sealed = self._plain = memoryview(b"")
        self._messages = self._read()

    def receive(self) -> Message | None:
        """A whole message, or None when there is none yet.

        Raises Broken at its end, and Malformed, which is the end as well.
        """
        return next(self._messages)

    def _read(self) -> Generator[Message | None, None, None]:
        ticket = memoryview(bytearray(TICKET_BYTES))
        yield from self._fill(ticket)
        self.peer, key = self._entrance.admit(self, bytes(ticket))
        if key:
            self._seal = _Seal(key)
            self._sealed = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
            self._plain = memoryview(bytearray(RECORD_BYTES))
        prefix = memoryview(bytearray(_PREFIX.size))
        while True:
            yield from self._part(prefix)
            frames, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
            if (
                frames not in (1, 2)
                or header_bytes > HEADER_LIMIT_BYTES
                or payload_bytes > PAYLOAD_LIMIT_BYTES
            ):
                raise Broken("a message that is longer than one may be")
            header = memoryview(bytearray(header_bytes))
            yield from self._part(header)
            begun: list[Frame] = [header.tobytes(), np.empty(payload_bytes, np.uint8).data]
            message = self._entrance.begin(begun[:frames])
            yield from self._part(memoryview(getattr(message, "payload", b"")))
            yield message

    def _part(self, part: memoryview) -> Iterator[None]:
        if self._seal is None:
            yield from self._fill(part)
            return
        for start in range(0, len(part), RECORD_BYTES):
            record = part[start : start + RECORD_BYTES]
            sealed, plain = self._sealed[: len(record) + TAG_BYTES], self._plain[: len(record)]
            yield from self._fill(sealed)
            self._seal.open(sealed, plain)
            record[:] = plain  # what is not what was sent must not get where others may read it

    def _fill(self, part: memoryview) -> Iterator[None]:
        while len(part):
            try:
                size = self.socket.recv_into(part)
            except BlockingIOError:
                yield None
                continue
            except OSError as error:
                raise Broken(str(error)) from None
            if not size:
                raise Broken("the other end has closed it")
            part = part[size:]


class Entrance:
    """Where connections come in, at a port of its own of `host` (an IP address).

    Raises OSError when it cannot listen there.
    """

    def __init__(self, host: str, poller: zmq.Poller, seals: bool, begin: Begin) -> None:
        self.begin = begin
        self.refused = 0
        """Connections without a ticket that counts."""
        self._poller = poller
        self._seals = seals
        self._tickets: dict[bytes, tuple[Peer, bytes]] = {}
        self._inbound: deque[_Inbound] = deque()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=STRANGERS_LIMIT)
        self._listener.setblocking(False)

    def invite(self, peer: Peer) -> Invitation:
        """For this peer; what it was given before counts no more."""
        self._forget(lambda each: each == peer)
        key = secrets.token_bytes(KEY_BYTES) if self._seals else b""
        invitation = Invitation(
            self._listener.getsockname()[1], secrets.token_bytes(TICKET_BYTES), key
        )
        self._tickets[invitation.ticket] = peer, key
        self._listen_on_demand()
        return invitation

    def admit(self, inbound: _Inbound, ticket: bytes) -> tuple[Peer, bytes]:
        """Whose ticket it is, and its key; an older connection of the same peer ends."""
        peer, key = self._tickets.pop(ticket, ("", b""))
        if not peer:
            raise Broken("no ticket")
        self._listen_on_demand()
        for each in [each for each in self._inbound if each.peer == peer]:
            self._end(each)
        return peer, key

    def receive(self) -> tuple[Peer, Message] | None:
        """A message that came whole, and of whom, or None. Raises Malformed."""
        if self._tickets:
            self._accept()
        for _ in range(len(self._inbound)):
            # from the one after the last, so that nobody starves the others
            self._inbound.rotate(-1)
            inbound = self._inbound[-1]
            try:
                message = inbound.receive()
            except Broken:
                self.refused += inbound.peer is None
                self._end(inbound)
                continue
            except Malformed:
                self._end(inbound)
                raise
            if message is not None and inbound.peer is not None:
                return inbound.peer, message
        return None

    def keep(self, peers: Collection[Peer]) -> None:
        """Nothing more from all others."""
        self._forget(lambda each: each not in peers)
        for inbound in [*self._inbound]:
            if inbound.peer is not None and inbound.peer not in peers:
                self._end(inbound)

    def tick(self, now: float) -> None:
        for inbound in [each for each in self._inbound if each.peer is None]:
            if inbound.since is None:
                inbound.since = now
            if now - inbound.since > STRANGERS_S:
                self.refused += 1
                self._end(inbound)

    def close(self) -> None:
        for inbound in [*self._inbound]:
            self._end(inbound)
        self._forget(lambda each: True)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            while True:
                accepted, _ = self._listener.accept()
                _configure(accepted)
                self._poller.register(accepted, zmq.POLLIN)
                self._inbound.append(_Inbound(accepted, self))
                strangers = [each for each in self._inbound if each.peer is None]
                if len(strangers) > STRANGERS_LIMIT:
                    self.refused += 1
                    self._end(strangers[0])

    def _end(self, inbound: _Inbound) -> None:
        self._inbound.remove(inbound)
        self._poller.unregister(inbound.socket)
        inbound.socket.close()

    def _forget(self, is_forgotten: Callable[[Peer], bool]) -> None:
        self._tickets = {
            ticket: (peer, key)
            for ticket, (peer, key) in self._tickets.items()
            if not is_forgotten(peer)
        }
        self._listen_on_demand()

    def _listen_on_demand(self) -> None:
        """Nobody is let in while nobody is expected."""
        if self._tickets:
            self._poller.register(self._listener, zmq.POLLIN)
        elif self._listener in self._poller:
            self._poller.unregister(self._listener)


def _configure(connection: socket.socket) -> None:
    connection.setblocking(False)
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
