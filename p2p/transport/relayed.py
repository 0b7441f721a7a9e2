"""A peer's connections of its own to its relays, for what is large; beside those of ZeroMQ.

For each relay one is asked for, through ZeroMQ, and asked for again when it ended. Where there is
none (its port may be closed), what is large goes through ZeroMQ as well.

Owned by one thread. Not here: what travels this way (`link.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from p2p.messages import Message
from p2p.transport.exchange import UNIX_SUFFIX
from p2p.transport.framing import LARGEST_BYTES, Broken, Target
from p2p.transport.hosts import host_of
from p2p.transport.incoming import Reading
from p2p.transport.passing import addressed, opened
from p2p.transport.placing import Place, begun
from p2p.transport.relay import RELAY, STREAM
from p2p.transport.sealing import Invitation
from p2p.transport.stream import Address, Connection
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, WireFormat

ASK_EVERY_S = 1.0
STALLED_S = 3.0
"""A connection that takes nothing of what it has for so long is closed."""
WAITING_LIMIT = 64
"""Messages that may wait for a relay."""
READING = Reading(ahead=True, takes_parts=True)

Received = tuple[bytes, Message]


@dataclass(slots=True)
class _Way:
    """To one relay."""

    address: Address | None
    """Where the relay is, a port apart; None for a name that cannot be resolved."""
    dealer: zmq.Socket[bytes]
    connection: Connection[Received] | None = None
    asked_at: float = -float("inf")
    moved: tuple[int, float] = (0, 0.0)
    """How much was sent, and since when it has not been more."""
    last: dict[bytes, int] = field(default_factory=dict)
    """For each destination how many bytes were taken up to the end of the last message for it."""


class RelayedStreams:
    """Those of the peer that `dealers` are of, one to each of `relays`."""

    def __init__(
        self,
        relays: Sequence[str],
        dealers: Sequence[zmq.Socket[bytes]],
        watch: Watch,
        wire: WireFormat[Message],
        place: Place,
    ) -> None:
        self._watch = watch
        self._wire = wire
        self._place = place
        self._ways = [
            _Way(_resolved(relay), dealer) for relay, dealer in zip(relays, dealers, strict=True)
        ]
        self._turn = self._heard = 0

    def tick(self, now: float) -> None:
        for way in self._ways:
            connection = way.connection
            if connection is None:
                if way.address is not None and now - way.asked_at >= ASK_EVERY_S:
                    way.asked_at = now
                    self._watch.used(way.dealer)
                    with suppress(zmq.Again):
                        way.dealer.send_multipart([RELAY, STREAM], zmq.NOBLOCK)
                continue
            connection.tick(now)
            arrived = connection.acknowledged_bytes
            way.last = {name: end for name, end in way.last.items() if end > arrived}
            if connection.is_idle or connection.sent_bytes != way.moved[0]:
                way.moved = connection.sent_bytes, now
            elif now - way.moved[1] > STALLED_S:
                self._end(way)

    @property
    def has_come(self) -> bool:
        """Whether something was received already that `receive` has not returned yet."""
        return any(way.connection is not None and way.connection.has_come for way in self._ways)

    @property
    def arrives(self) -> bool:
        """Whether something is just coming in from a relay."""
        return any(way.connection is not None and way.connection.arriving for way in self._ways)

    def arrives_from(self, source: bytes) -> bool:
        """Whether that is of this source."""
        return any(
            way.connection is not None and any(of == source for of, _ in way.connection.arriving)
            for way in self._ways
        )

    def leaves_to(self, destination: bytes) -> bool:
        """Whether something for it is just going out to a relay, or waits for what does."""
        return any(
            way.connection is not None
            and way.connection.is_leaving
            and way.last.get(destination, 0) > way.connection.acknowledged_bytes
            for way in self._ways
        )

    def on_invitation(self, number: int, frames: Sequence[Frame]) -> None:
        """The relay of this number has answered."""
        way = self._ways[number]
        address = way.address
        if address is not None and way.connection is None and len(frames) == 2:
            with suppress(OSError, ValueError):
                invitation = Invitation.from_bytes(frames[1])
                if isinstance(address, tuple):
                    address = address[0], invitation.port
                way.connection = Connection.dialled(
                    address, invitation, self._watch, self._begin, READING
                )

    def send(self, destination: bytes, header: Frame, payload: Frame) -> bool:
        """False when there is no connection with room; a payload must not be changed after."""
        if len(payload) > LARGEST_BYTES:
            return False
        for _ in self._ways:
            self._turn = (self._turn + 1) % len(self._ways)
            way = self._ways[self._turn]
            connection = way.connection
            if connection is None or not connection.is_open or connection.waiting >= WAITING_LIMIT:
                continue
            try:
                connection.send([addressed(destination, header), payload])
            except Broken:
                self._end(way)
            else:
                way.last[destination] = connection.taken_bytes
                return True
        return False

    def receive(self) -> Received | None:
        """A message and of whom, or None. Raises Malformed.

        Has to be called until it returns None, or again without waiting.
        """
        for _ in self._ways:
            # from the one after the last, so that no relay starves the others
            self._heard = (self._heard + 1) % len(self._ways)
            way = self._ways[self._heard]
            if way.connection is None:
                continue
            try:
                way.connection.flush()
                received = way.connection.receive()
            except Broken:
                self._end(way)
            else:
                if received is not None:
                    return received
        return None

    def close(self) -> None:
        for way in self._ways:
            self._end(way)

    def _begin(self, header: bytes, size: int | None) -> tuple[Received, Target]:
        source, rest = opened(header)
        message, target = begun(self._wire, rest, size, is_guarded=True, place=self._place)
        return (source, message), target

    def _end(self, way: _Way) -> None:
        if way.connection is not None:
            way.connection.close()
            way.connection = None
            way.last.clear()


def _resolved(relay: str) -> Address | None:
    if relay.startswith("ipc://"):
        return Path(relay.removeprefix("ipc://") + UNIX_SUFFIX)
    try:
        found = socket.getaddrinfo(host_of(relay), 0, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return None
    return str(found[0][4][0]), 0
