"""Links from peer to peer without a relay, where one can be reached by the other.

A peer listens at endpoints of its own. To whoever sends it much through a relay, or within a host
beats, it says so there, with a number made for that peer (`Hello`). That peer knocks at one of the
endpoints with the number and is welcomed; the welcome invites to a connection (`stream.py`), and
what is to be sent goes there. Between processes of one host a segment is only named, and read where
it lies (`shared.py`).

Whatever a link does not take is for the relay, and so is what was asked for again: then the link is
knocked at once more, and given up if no welcome comes. Nothing of all this is needed for a step to
end.

A peer's links are owned by one thread. Not here: what the messages mean, and when to say hello.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

import zmq

from fault.records import Peer
from p2p.messages import Hello, Message, Segment, StatePart, Total
from p2p.traffic import Traffic
from p2p.transport.entrance import Entrance
from p2p.transport.framing import LARGEST_BYTES, Broken, Target
from p2p.transport.hosts import host_of, is_within_host
from p2p.transport.incoming import Reading
from p2p.transport.keys import Gate, PeerKeys, dial
from p2p.transport.link import BULK_LIMIT_MESSAGES, received_frames
from p2p.transport.placing import Place, begun, nowhere
from p2p.transport.relay import (
    HANDSHAKE_MS,
    HEARTBEAT_INTERVAL_MS,
    HEARTBEAT_TIMEOUT_MS,
)
from p2p.transport.sealing import Invitation
from p2p.transport.shared import Gone, Pool, Reference
from p2p.transport.stream import Address, Connection
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, Malformed, WireFormat

HELLO_EVERY_S = 1.0
WELCOME_S = 0.5
"""A link that was knocked at and says nothing for so long carries nothing."""
CONNECT_S = 3.0
MISTRUST_S, MISTRUST_LIMIT_S = 1.0, 60.0
"""So long a link that failed is not tried again; twice as long each time."""
NAMED_FROM_BYTES = 32 << 10
"""Smaller payloads are sooner copied through a socket than mapped and read."""
KNOCK, WELCOME, NAMED = b"K", b"W", b"R"
"""The first byte: both ways of the handshake; a header that a reference comes before, in place of a
payload."""
KNOCK_LIMIT_BYTES = 1 << 10
IPC = "ipc://"
UNIX_SUFFIX = ".links"
"""Of the name of the Unix socket for connections, beside the one that is knocked at."""


@dataclass(slots=True)
class _Outgoing:
    dealer: zmq.Socket[bytes]
    endpoint: str
    is_guarded: bool
    """What goes there is authenticated, or never leaves the host."""
    number: int
    stream: Connection[Message] | None = None
    """What is sent goes there, once it is open."""
    knocked: bool = False
    """The last knock went out, for the connection was there."""
    knocked_at: float = -float("inf")
    """Or when it was first tried."""
    welcomed: bool = False
    """Since then."""
    mistrust_s: float = MISTRUST_S
    not_before: float = -float("inf")

    @property
    def up(self) -> bool:
        return self.stream is not None and self.stream.is_open

    @property
    def patience_s(self) -> float:
        is_connecting = not self.knocked or (self.stream is not None and not self.stream.is_open)
        return CONNECT_S if is_connecting else WELCOME_S

    @property
    def is_within_host(self) -> bool:
        return self.endpoint.startswith(IPC)

    def put_down(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class DirectLinks:
    """Those of the peer `me`, which listens at `binds` (ZeroMQ endpoints, ports may be `*`).

    They are all TCP or all Unix sockets; with `keys` those over TCP are for the run's peers only.
    """

    def __init__(
        self,
        me: Peer,
        binds: Sequence[str],
        context: zmq.Context[zmq.Socket[bytes]],
        watch: Watch,
        wire: WireFormat[Message],
        pool: Pool,
        traffic: Traffic,
        keys: PeerKeys | None = None,
        place: Place = nowhere,
    ) -> None:
        self.me = me
        self.traffic = traffic
        self._place = place
        self._context = context
        self._watch = watch
        self._wire = wire
        self._pool = pool
        self._said: dict[Peer, tuple[int, float]] = {}
        """Whom a hello was said to: its number, and when."""
        self._outgoing: dict[Peer, _Outgoing] = {}
        self._waiting: set[Peer] = set()
        """Knocked at and not yet answered."""
        self._router = context.socket(zmq.ROUTER)
        _configure(self._router)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoints: list[str] = []
        self.is_local = all(endpoint.startswith(IPC) for endpoint in binds)
        """It is reached from this host alone."""
        self._is_guarded = keys is not None or all(map(is_within_host, binds))
        """What comes here was authenticated, or never left the host."""
        self._keys = keys
        self._gate: Gate | None = None
        if keys is not None and not self.is_local:
            self._gate = Gate(context, keys.public)
            self._gate.guard(self._router, keys.secret)
        for endpoint in binds:
            self._router.ipv6 = "[" in endpoint
            try:
                self._router.bind(endpoint)
            except zmq.ZMQError as error:
                print(f"{me}: no direct links, {endpoint}: {error}", file=sys.stderr)
            else:
                self.endpoints.append(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._entrance: Entrance[Message] | None = None
        self._turn = 0
        if self.endpoints:
            addresses: list[Address] = [*dict.fromkeys(map(_entrance_of, self.endpoints))]
            seals = keys is not None and not self.is_local
            try:
                self._entrance = Entrance(addresses, watch, seals, self._begun, Reading(ahead=True))
            except OSError as error:
                print(f"{me}: no direct links, {addresses}: {error}", file=sys.stderr)
                for endpoint in self.endpoints:
                    self._router.unbind(endpoint)
                self.endpoints.clear()
        watch.register(self._router, zmq.POLLIN)

    # --- making links -----------------------------------------------------------------------

    def hello(self, peer: Peer, now: float) -> Hello | None:
        """What to say to a peer whose messages come through a relay; None so soon after the last.

        Its messages may all come here as soon as it knows.
        """
        said = self._said.get(peer)
        if not self.endpoints or (said is not None and now - said[1] < HELLO_EVERY_S):
            return None
        number = secrets.randbits(62) if said is None else said[0]
        self._said[peer] = (number, now)
        return Hello(tuple(self.endpoints), number)

    def on_hello(self, peer: Peer, hello: Hello, now: float) -> None:
        endpoint = next(filter(_reachable, hello.endpoints), None)
        link = self._outgoing.get(peer)
        if endpoint is None or (link is not None and (link.up or now < link.not_before)):
            return
        if link is None or link.endpoint != endpoint:
            self._close(peer)
            dealer = self._dealer(endpoint)
            if dealer is None:
                return
            is_guarded = self._keys is not None or is_within_host(endpoint)
            link = self._outgoing[peer] = _Outgoing(dealer, endpoint, is_guarded, hello.number)
        link.number = hello.number
        self._knock(peer, link, now)

    def keep(self, peers: Collection[Peer]) -> None:
        """Lets go of all others."""
        for peer in [peer for peer in self._outgoing if peer not in peers]:
            self._close(peer)
        if self._entrance is not None:
            self._entrance.keep([peer.encode() for peer in peers])
        self._said = {peer: said for peer, said in self._said.items() if peer in peers}

    def check(self, peer: Peer, now: float) -> None:
        """Something that was sent was asked for again: does the link carry anything?"""
        link = self._outgoing.get(peer)
        if link is not None and link.up and peer not in self._waiting:
            self._knock(peer, link, now)

    def hears(self, peer: Peer) -> bool:
        """Whether the peer has a connection to here."""
        return self._entrance is not None and peer.encode() in self._entrance.named

    def arrives_from(self, peer: Peer) -> bool:
        """Whether something large of the peer is just coming in."""
        if self._entrance is None:
            return False
        connection = self._entrance.named.get(peer.encode())
        return connection is not None and bool(connection.arriving)

    def leaves_to(self, peer: Peer) -> bool:
        """Whether something for the peer is just going out, or waits for what does."""
        link = self._outgoing.get(peer)
        return link is not None and link.stream is not None and link.stream.is_leaving

    def tick(self, now: float) -> None:
        if self._gate is not None:
            self.traffic.refused_keys = self._gate.refused
        for link in self._outgoing.values():
            if link.stream is not None:
                link.stream.tick(now)
        if self._entrance is not None:
            self._entrance.tick(now)
            self.traffic.refused += self._entrance.taken_refused()
        for peer in [*self._waiting]:
            link = self._outgoing[peer]
            if self._settle(peer, link):
                continue
            if not link.knocked and now - link.knocked_at <= CONNECT_S:
                self._send_knock(link, now)
            elif now - link.knocked_at > link.patience_s:
                self._wait_no_more(peer, link)
                link.put_down()
                link.not_before = now + link.mistrust_s
                link.mistrust_s = min(MISTRUST_LIMIT_S, 2 * link.mistrust_s)

    # --- messages ---------------------------------------------------------------------------

    def send(self, peer: Peer, message: Message) -> bool:
        """False when there is no link to the peer, or it takes nothing now.

        A payload is not copied and must not be changed after.
        """
        link = self._outgoing.get(peer)
        if link is None or link.stream is None or not link.stream.is_open:
            return False
        if link.stream.waiting >= BULK_LIMIT_MESSAGES:
            return False
        payload = memoryview(getattr(message, "payload", b""))
        header, *rest = self._wire.encode(message, hashed=not link.is_guarded)
        reference = None
        if payload.nbytes >= NAMED_FROM_BYTES and link.is_within_host:
            reference = self._pool.reference(payload)
        if reference is not None:
            header, rest = NAMED + reference.to_bytes() + header, []
        elif payload.nbytes > LARGEST_BYTES:
            return False
        try:
            link.stream.send([header, *rest])
        except Broken:
            link.put_down()
            return False
        if reference is not None:
            self.traffic.named += 1
            self.traffic.named_bytes += payload.nbytes
        else:
            self.traffic.direct += 1
            self.traffic.direct_bytes += payload.nbytes
        return True

    def send_at_once(self, peer: Peer, message: Message) -> bool:
        """As `send`, for what must not be held up, nor lost without anyone's notice.

        So it goes nowhere beyond this host, nor where something waits to be sent already.
        """
        link = self._outgoing.get(peer)
        if link is None or not link.is_within_host or link.stream is None:
            return False
        return link.stream.is_idle and self.send(peer, message)

    @property
    def has_come(self) -> bool:
        """Whether something was received already that `receive` has not returned yet."""
        connections = self._entrance.connections.values() if self._entrance is not None else ()
        return any(each.has_come for each in connections)

    @property
    def has_all(self) -> bool:
        """Whether all that the last look found, and is left of it, is for `receive`."""
        return self._entrance is not None and self._watch.is_nothing_but(self._entrance.connections)

    def flush(self) -> None:
        """Writes what had to wait, where the last look found room; to be called after each."""
        for link in self._outgoing.values():
            if link.stream is not None:
                try:
                    link.stream.flush()
                except Broken:
                    link.put_down()
        for peer in [*self._waiting]:
            self._settle(peer, self._outgoing[peer])

    def receive(self) -> tuple[Peer, Message] | None:
        """A message that came, or None; never waits.

        Raises Malformed, as `WireFormat.decode`, and Gone for one whose bytes are not there any
        more; others may follow. Has to be called until it returns None, or again without waiting.
        """
        if self._entrance is not None:
            streams = [*self._entrance.connections.values()]
            for _ in streams:
                # from the one after the last, so that nobody starves the others
                self._turn = (self._turn + 1) % len(streams)
                stream = streams[self._turn]
                message = self._entrance.receive(stream)
                if message is not None:
                    return stream.name.decode("ascii", "replace"), message
        if not self.has_all:
            self._hear_welcomes()
            if self._entrance is not None:
                self._hear_knocks(self._entrance)
                self._entrance.accept()
        return None

    def close(self) -> None:
        for peer in [*self._outgoing]:
            self._close(peer)
        if self._entrance is not None:
            self._entrance.close()
        self._watch.unregister(self._router)
        if self._gate is not None:
            self._gate.close()
        self._router.close(linger=0)
        for endpoint in self.endpoints:
            if endpoint.startswith(IPC):
                Path(endpoint.removeprefix(IPC)).unlink(missing_ok=True)

    def _hear_knocks(self, entrance: Entrance[Message]) -> None:
        while (received := received_frames(self._router, self._watch)) is not None:
            source, *frames = received
            peer = bytes(source).decode("ascii", "replace")
            said = self._said.get(peer)
            if said is not None and frames == [KNOCK + _packed(said[0])]:
                invitation = entrance.invite(peer.encode()).to_bytes()
                self._answer(peer, WELCOME + _packed(said[0]) + invitation)
            else:
                self.traffic.refused += 1

    def _begun(self, header: bytes, size: int | None) -> tuple[Message, Target]:
        if not self.is_local or not header.startswith(NAMED):
            return begun(self._wire, header, size, self._is_guarded, self._place)
        if size is not None:
            raise Malformed("a reference, and a payload as well")
        end = len(NAMED) + Reference.BYTES
        try:
            reference = Reference.from_bytes(header[len(NAMED) : end])
        except ValueError as error:
            raise Malformed(f"no reference: {error}") from None
        try:
            return self._read(header[end:], reference), memoryview(b"")
        except Gone:
            self.traffic.gone += 1
            raise

    def _read(self, header: Frame, reference: Reference) -> Message:
        """A message with what it names: a segment's bytes where they are, others' copied."""
        reader = self._pool.reader
        message = self._wire.decode([header, reader.view(reference)], is_guarded=True)
        if isinstance(message, Segment) and reader.borrow(reference, message.step):
            return message
        if isinstance(message, Segment | Total | StatePart):
            return replace(message, payload=reader.copy(reference))
        return message

    def _answer(self, peer: Peer, frame: bytes) -> None:
        self._watch.used(self._router)
        try:
            self._router.send_multipart([peer.encode(), frame], zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # it went away, and knocks again if it comes back

    def _hear_welcomes(self) -> None:
        for peer in [*self._waiting]:
            link = self._outgoing[peer]
            while (said := received_frames(link.dealer, self._watch)) is not None:
                welcome = WELCOME + _packed(link.number)
                if said and bytes(said[0]).startswith(welcome):
                    self._follow(link, bytes(said[0])[len(welcome) :])
            self._settle(peer, link)

    def _settle(self, peer: Peer, link: _Outgoing) -> bool:
        """Whether the link carries what is sent, and no welcome is waited for."""
        is_settled = link.up and link.welcomed
        if is_settled and peer in self._waiting:
            link.mistrust_s = MISTRUST_S
            self._wait_no_more(peer, link)
        return is_settled

    def _follow(self, link: _Outgoing, invitation: bytes) -> None:
        """A welcome came, and with it an invitation."""
        link.welcomed = True
        if link.stream is None:
            with suppress(OSError, ValueError):
                invited = Invitation.from_bytes(invitation)
                address = _entrance_of(link.endpoint, invited.port)
                link.stream = Connection.dialled(
                    address, invited, self._watch, self._begun, reading=None
                )

    def _knock(self, peer: Peer, link: _Outgoing, now: float) -> None:
        link.knocked_at, link.welcomed = now, False
        while received_frames(link.dealer) is not None:
            pass  # a welcome that came too late
        self._waiting.add(peer)
        self._watch.register(link.dealer, zmq.POLLIN)
        self._send_knock(link, now)

    def _send_knock(self, link: _Outgoing, now: float) -> None:
        self._watch.used(link.dealer)
        try:
            link.dealer.send(KNOCK + _packed(link.number), zmq.NOBLOCK)
            link.knocked, link.knocked_at = True, now
        except zmq.Again:
            link.knocked = False  # not connected yet

    def _dealer(self, endpoint: str) -> zmq.Socket[bytes] | None:
        """None for an endpoint that cannot be."""
        dealer = self._context.socket(zmq.DEALER)
        _configure(dealer)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.ROUTING_ID, self.me.encode())
        if self._keys is not None and not endpoint.startswith(IPC):
            dial(dealer, self._keys, self._keys.public)
        dealer.ipv6 = "[" in endpoint
        try:
            dealer.connect(endpoint)
        except zmq.ZMQError:
            dealer.close(linger=0)
            return None
        return dealer

    def _wait_no_more(self, peer: Peer, link: _Outgoing) -> None:
        """Nothing comes from there but welcomes, so there is no more to be looked for."""
        self._waiting.discard(peer)
        self._watch.register(link.dealer, 0)

    def _close(self, peer: Peer) -> None:
        link = self._outgoing.pop(peer, None)
        if link is not None:
            self._wait_no_more(peer, link)
            link.dealer.close(linger=0)
            link.put_down()


def _reachable(endpoint: str) -> bool:
    """A Unix socket is only there on this very host."""
    return not endpoint.startswith(IPC) or Path(endpoint.removeprefix(IPC)).exists()


def _entrance_of(endpoint: str, port: int = 0) -> Address:
    """Where connections are taken by whoever is knocked at there. Raises ValueError."""
    if endpoint.startswith(IPC):
        return Path(endpoint.removeprefix(IPC) + UNIX_SUFFIX)
    return str(ip_address(host_of(endpoint))), port


def _packed(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _configure(socket: zmq.Socket[bytes]) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, BULK_LIMIT_MESSAGES),
        (zmq.RCVHWM, BULK_LIMIT_MESSAGES),
        (zmq.MAXMSGSIZE, KNOCK_LIMIT_BYTES),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.TCP_KEEPALIVE, 1),
    ):
        socket.setsockopt(option, value)
