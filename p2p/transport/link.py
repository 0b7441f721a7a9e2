"""A peer's link to its relays: send to a peer by name, receive from anyone, never wait.

A link has one DEALER socket per relay and spreads its messages over those that are connected and
have room; when one is gone, the rest carry on, and ZeroMQ reconnects on its own. A message that no
relay takes is dropped and counted: the protocol asks again. So messages may be lost, or overtake
each other.

One thread owns a link. Not here: what the frames hold (`wire.py`), and what to do about a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import zmq

from fault.records import Peer
from p2p.messages import Message
from p2p.transport.hosts import is_within_host
from p2p.transport.keys import PeerKeys, dial
from p2p.transport.placing import Place
from p2p.transport.relay import (
    HANDSHAKE_MS,
    HEARTBEAT_INTERVAL_MS,
    HEARTBEAT_TIMEOUT_MS,
    RELAY,
    STREAM,
)
from p2p.transport.relayed import RelayedStreams
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, WireFormat

IDENTITY_LIMIT_BYTES = 253
"""ZeroMQ's 255, less the suffix of `ControlAndBulk`."""
RECONNECT_MS, RECONNECT_LIMIT_MS = 20, 200
CONNECT_TIMEOUT_MS = 3000
COPY_BELOW_BYTES = 128 << 10
"""Handing a buffer over uncopied costs about 5 µs; on a 2-core machine it pays from 128 KiB on."""
_READABLE = int(zmq.POLLIN)
CONTROL_LIMIT_MESSAGES = 1000
STREAMED_FROM_BYTES = 128 << 10
"""What is smaller goes through ZeroMQ."""
BULK_LIMIT_MESSAGES = 64
"""Per relay and direction, so with segments of 4 MiB at most 256 MiB wait in either."""


@dataclass(slots=True)
class Traffic:
    """What went through a link since it was made; `dropped` found no relay with room."""

    sent: int = 0
    received: int = 0
    dropped: int = 0


class Link:
    """The peer `identity` on all of `relays` (ZeroMQ endpoints).

    `limit_messages` bounds what waits in each direction per relay; `keys` are for relays over TCP.
    Raises ValueError for an identity that ZeroMQ does not allow, or without relays.
    """

    def __init__(
        self,
        identity: bytes,
        relays: Sequence[str],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        limit_messages: int = CONTROL_LIMIT_MESSAGES,
        keys: PeerKeys | None = None,
    ) -> None:
        if not relays:
            raise ValueError("a link needs a relay")
        if not 0 < len(identity) <= 255 or identity[0] == 0:
            raise ValueError(f"{identity!r} cannot be the identity of a peer")
        self.traffic = Traffic()
        self.streams: RelayedStreams | None = None
        """For what is large; there are none before `stream`."""
        self._watch: Watch | None = None
        self._relays = relays
        self._context = context or zmq.Context.instance()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._poller = zmq.Poller()
        self._last_sent = self._last_received = 0
        for endpoint in relays:
            dealer = self._context.socket(zmq.DEALER)
            self._sockets.append(dealer)
            _configure(dealer, identity, limit_messages)
            if keys is not None and endpoint.startswith("tcp://"):
                dial(dealer, keys, keys.relay)
            dealer.ipv6 = "[" in endpoint
            dealer.connect(endpoint)
            self._poller.register(dealer, zmq.POLLIN)

    def send(self, destination: bytes, frames: Sequence[Frame]) -> bool:
        """Hands the frames to a relay; False, and counted, when none has room.

        Frames of `COPY_BELOW_BYTES` and more are not copied and must not be changed after.
        """
        for _ in self._sockets:
            self._last_sent = (self._last_sent + 1) % len(self._sockets)
            dealer = self._sockets[self._last_sent]
            if self._watch is not None:
                self._watch.used(dealer)
            if offer(dealer, [destination, *frames]):
                self.traffic.sent += 1
                return True
        self.traffic.dropped += 1
        return False

    def receive(self) -> tuple[bytes, list[Frame]] | None:
        """The source and the frames of a waiting message, or None; never waits.

        Small frames are bytes, large ones memoryviews of the buffer ZeroMQ received into.
        """
        for _ in self._sockets:
            # from the one after the last, so that no relay starves the others
            self._last_received = (self._last_received + 1) % len(self._sockets)
            dealer = self._sockets[self._last_received]
            message = received_frames(dealer, self._watch)
            if message is None:
                continue
            source, *frames = message
            if self.streams is not None and source == RELAY and frames[:1] == [STREAM]:
                self.streams.on_invitation(self._last_received, frames)
                continue
            self.traffic.received += 1
            return bytes(source), frames
        return None

    def watched(self, watch: Watch) -> None:
        """From now on only what `watch` has found is received."""
        self._watch = watch
        for dealer in self._sockets:
            watch.register(dealer, zmq.POLLIN)

    def stream(self, watch: Watch, wire: WireFormat[Message], place: Place) -> None:
        """As `watched`; what is large may have connections of its own."""
        self.watched(watch)
        self.streams = RelayedStreams(self._relays, self._sockets, watch, wire, place)

    def wait(self, timeout_ms: int) -> bool:
        """Whether something can be received, waiting for it at most this long."""
        return bool(self._poller.poll(timeout_ms))

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """To register with a `zmq.Poller`: POLLIN, or POLLOUT for room to send."""
        return list(self._sockets)

    def close(self, linger_ms: int = 0) -> None:
        """What has not been sent when the context ends, `linger_ms` later at most, is lost."""
        if self.streams is not None:
            self.streams.close()
        for dealer in self._sockets:
            dealer.close(linger=linger_ms)


class ControlAndBulk:
    """Two links as one: small control messages never queue behind megabytes of segments.

    A peer `name` is `name/c` and `name/b` to the relays; here it is only ever `name`.
    """

    CONTROL, BULK = b"/c", b"/b"

    def __init__(
        self,
        identity: bytes,
        relays: Sequence[str],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        keys: PeerKeys | None = None,
    ) -> None:
        if len(identity) > IDENTITY_LIMIT_BYTES:
            raise ValueError(f"{identity!r} is too long for the identity of a peer")
        self.is_guarded = keys is not None or all(map(is_within_host, relays))
        """What goes through these relays is authenticated, or only copied, by the kernel."""
        self.control = Link(identity + self.CONTROL, relays, context, keys=keys)
        self.bulk = Link(identity + self.BULK, relays, context, BULK_LIMIT_MESSAGES, keys)

    def send_control(self, destination: bytes, frames: Sequence[Frame]) -> bool:
        """For what is small and must not wait: beats, asks, views."""
        return self.control.send(destination + self.CONTROL, frames)

    def send_bulk(self, destination: bytes, frames: Sequence[Frame]) -> bool:
        """For segments and parts of states."""
        return self.bulk.send(destination + self.BULK, frames)

    def stream(self, watch: Watch, wire: WireFormat[Message], place: Place) -> None:
        """From now on what `watch` has found is received, and what is large may go over
        connections of our own."""
        self.control.watched(watch)
        self.bulk.stream(watch, wire, place)

    def send_streamed(self, destination: bytes, header: Frame, payload: Frame) -> bool:
        """False when there is no such connection with room. The payload must not be changed after,
        and needs no checksum."""
        streams = self.bulk.streams
        return streams is not None and streams.send(destination + self.BULK, header, payload)

    @property
    def has_come(self) -> bool:
        """Whether `receive_streamed` may have something though no look finds it."""
        return self.bulk.streams is not None and self.bulk.streams.has_come

    @property
    def arrives(self) -> bool:
        """Whether something large is just coming in over such a connection."""
        return self.bulk.streams is not None and self.bulk.streams.arrives

    def arrives_from(self, source: bytes) -> bool:
        """Whether that is of this source."""
        streams = self.bulk.streams
        return streams is not None and streams.arrives_from(source + self.BULK)

    def leaves_to(self, destination: bytes) -> bool:
        """Whether something large for it is just going out over such a connection."""
        streams = self.bulk.streams
        return streams is not None and streams.leaves_to(destination + self.BULK)

    def receive_streamed(self) -> tuple[bytes, Message] | None:
        """What came over such a connection, or None. Raises Malformed.

        Has to be called until it returns None, or again without waiting.
        """
        received = self.bulk.streams.receive() if self.bulk.streams is not None else None
        if received is None:
            return None
        return received[0].removesuffix(self.BULK), received[1]

    def tick(self, now: float) -> None:
        if self.bulk.streams is not None:
            self.bulk.streams.tick(now)

    def receive(self) -> tuple[bytes, list[Frame]] | None:
        """A waiting message, control before bulk, or None. See `Link.receive`."""
        message = self.control.receive() or self.bulk.receive()
        if message is None:
            return None
        source, frames = message
        return source.removesuffix(self.CONTROL).removesuffix(self.BULK), frames

    def wait(self, timeout_ms: int) -> bool:
        """Whether something can be received, waiting for it at most this long."""
        poller = zmq.Poller()
        for each in self.sockets():
            poller.register(each, zmq.POLLIN)
        return bool(poller.poll(timeout_ms))

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return self.control.sockets() + self.bulk.sockets()

    def close(self, linger_ms: int = 0) -> None:
        """Lets go of what is large; what is small may linger."""
        self.control.close(linger_ms)
        self.bulk.close()


def _configure(dealer: zmq.Socket[bytes], identity: bytes, limit_messages: int) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        # nothing is queued for a relay that is not connected, so it goes to one that is
        (zmq.IMMEDIATE, 1),
        (zmq.SNDHWM, limit_messages),
        (zmq.RCVHWM, limit_messages),
        (zmq.RECONNECT_IVL, RECONNECT_MS),
        (zmq.RECONNECT_IVL_MAX, RECONNECT_LIMIT_MS),
        (zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        # a process that dies closes its connection; these are for a machine that goes silent
        (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.ROUTING_ID, identity),
    ):
        dealer.setsockopt(option, value)


def offer(dealer: zmq.Socket[bytes], frames: Sequence[Frame]) -> bool:
    """Sends a message, unless there is no room for it now."""
    taken = True
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        flags = zmq.NOBLOCK if index == last else zmq.NOBLOCK | zmq.SNDMORE
        try:
            dealer.send(frame, flags, copy=len(frame) < COPY_BELOW_BYTES)
        except zmq.Again:
            if index == 0:
                return False
            # the other end went away in the middle: ZeroMQ drops the message, but only after its
            # last frame does the next one count as a new message
            taken = False
    return taken


def received_frames(socket: zmq.Socket[bytes], watch: Watch | None = None) -> list[Frame] | None:
    """Small frames are bytes, large ones memoryviews of the buffer ZeroMQ received into.

    None when there is no message, or `watch` has found none.
    """
    if watch is not None and not watch.is_readable(socket):
        return None
    # to ask costs less than to find out by zmq.Again
    if not cast(int, socket.get(zmq.EVENTS)) & _READABLE:
        if watch is not None:
            watch.found_empty(socket)
        return None
    # small frames lie at any address in a shared buffer, and would keep it alive; large ones have
    # their own, aligned for float32
    return [
        frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer
        for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)
    ]


def relay_bulk(link: ControlAndBulk, wire: WireFormat[Message], to: Peer, message: Message) -> bool:
    """Hands what may be large to a relay by the fastest way that there is; False without any."""
    if len(getattr(message, "payload", b"")) >= STREAMED_FROM_BYTES:
        header, payload = wire.encode(message, hashed=False)
        if link.send_streamed(to.encode(), header, payload):
            return True
    frames = wire.encode(message, hashed=not link.is_guarded)
    return link.send_bulk(to.encode(), frames)


def relayed(link: ControlAndBulk, wire: WireFormat[Message]) -> tuple[Peer, Message] | None:
    """What came through a relay, whichever way, or None. Raises Malformed."""
    received = link.receive()
    if received is not None:
        source, frames = received
        message = wire.decode(frames, is_guarded=link.is_guarded)
    else:
        streamed = link.receive_streamed()
        if streamed is None:
            return None
        source, message = streamed
    return source.decode("ascii", "replace"), message
