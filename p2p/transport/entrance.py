"""Where connections of our own come in: whoever has a ticket, and few others for a short time."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import zmq

from p2p.transport.framing import Begin, Broken
from p2p.transport.incoming import Reading
from p2p.transport.sealing import KEY_BYTES, TICKET_BYTES, Invitation
from p2p.transport.stream import Address, Connection, family_of
from p2p.transport.watch import Watch

TICKETS_LIMIT = 1024
"""Of those that nobody has shown yet the oldest counts no more."""
STRANGERS_LIMIT = 64
"""Connections that have not shown a ticket yet; beyond that the oldest is closed,"""
STRANGERS_S = 5.0
"""and after this time."""
_READ = int(zmq.POLLIN)

M = TypeVar("M")


class Entrance(Generic[M]):
    """Where connections come in, at `addresses`; those with a port have the same one.

    A port of 0 is any that is free. Raises OSError when it cannot listen there.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        watch: Watch,
        seals: bool,
        begin: Begin[M],
        reading: Reading,
    ) -> None:
        self.begin = begin
        self.connections: dict[int, Connection[M]] = {}
        """By their descriptors,"""
        self.named: dict[bytes, Connection[M]] = {}
        """and by whose they are."""
        self._refused = 0
        self._watch = watch
        self._seals = seals
        self._reading = reading
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
        """Whoever has this name; the same again until it was made use of, for it may be late."""
        for ticket, (known, key) in self._tickets.items():
            if known == name:
                return Invitation(self._port, ticket, key)
        key = secrets.token_bytes(KEY_BYTES) if self._seals else b""
        invitation = Invitation(self._port, secrets.token_bytes(TICKET_BYTES), key)
        if len(self._tickets) >= TICKETS_LIMIT:
            del self._tickets[next(iter(self._tickets))]
        self._tickets[invitation.ticket] = name, key
        self._accept_on_demand()
        return invitation

    def _admit(self, connection: Connection[M], ticket: bytes) -> tuple[bytes, bytes]:
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
            try:
                while True:
                    taken, _ = listener.accept()
                    made = Connection.accepted(
                        taken, self._watch, self.begin, self._admit, self._reading
                    )
                    self.connections[made.fileno()] = made
                    strangers = [each for each in self.connections.values() if not each.name]
                    if len(strangers) > STRANGERS_LIMIT:
                        self.end(strangers[0])
            except BlockingIOError:
                continue
            except OSError:  # too many open files, or it went away: until the next tick
                self._watch.register(listener, 0)

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
        self._accept_on_demand()
        for connection in self.connections.values():
            connection.tick(now)
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
                family=family_of(address[0]),
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
            self._watch.register(listener, _READ if self._tickets else 0)
