"""Links from peer to peer over real sockets: made by a hello, given up when they carry nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from p2p.messages import KINDS, Beat, Hello, Message, Segment, StatePart
from p2p.traffic import Traffic
from p2p.transport.direct import HELLO_EVERY_S, MISTRUST_S, NAMED_FROM_BYTES, WELCOME_S, DirectLinks
from p2p.transport.link import ControlAndBulk
from p2p.transport.shared import Gone, Pool
from p2p.transport.underway import LinksUnderway
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed, WireFormat

WIRE: WireFormat[Message] = WireFormat(KINDS)
MEBIBYTE = 1 << 20
WAYS = {"host": "ipc://{folder}/{name}", "tcp": "tcp://127.0.0.1:*"}


class End:
    """One peer's links, with a clock of its own."""

    def __init__(self, name: str, bind: str) -> None:
        self.name = name
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.watch = Watch()
        self.pool = Pool()
        binds = [bind] if bind else []
        self.links = DirectLinks(name, binds, self.context, self.watch, WIRE, self.pool, Traffic())

    def received(self, seconds: float = 0.05) -> list[tuple[str, Message]]:
        found: list[tuple[str, Message]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.watch.poll(5)
            self.links.flush()
            while (message := self.links.receive()) is not None:
                found.append(message)
        return found

    def segment(self, size: int, value: float = 1.0) -> Segment:
        vector = self.pool.take(size // 4)
        vector[:] = value
        return Segment(1, 2, 3, 4, 5, "digest", vector.data.cast("B"))

    def close(self) -> None:
        if not self.context.closed:
            self.links.close()
            self.context.destroy(linger=0)


@pytest.fixture(params=WAYS)
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], End]]:
    made: list[End] = []

    def make(name: str) -> End:
        made.append(End(name, WAYS[request.param].format(folder=tmp_path, name=name)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def introduced(sender: End, receiver: End, now: float = 0.0) -> Hello:
    """`receiver` has said hello, and `sender` has knocked until it was welcomed."""
    hello = receiver.links.hello(sender.name, now)
    assert hello is not None
    until = time.monotonic() + 5
    while not sender.links.send(receiver.name, Beat(0, 0, "", 0, 0)):
        assert time.monotonic() < until
        sender.links.on_hello(receiver.name, hello, now)
        receiver.received()
        sender.received()
    assert [message for _, message in receiver.received()] == [Beat(0, 0, "", 0, 0)]
    return hello


@pytest.mark.parametrize("size", [0, 4, 1000, NAMED_FROM_BYTES, 1 << 20])
def test_what_is_sent_arrives(size: int, ends: Callable[[str], End]) -> None:
    a, b = ends("a"), ends("b")
    introduced(a, b)
    sent = a.segment(size, 7.0)
    assert a.links.send("b", sent)
    came: list[tuple[str, Message]] = []
    until = time.monotonic() + 5
    while not came and time.monotonic() < until:
        a.received(0.01)  # which sends the rest
        came += b.received(0.01)
    ((peer, message),) = came
    assert peer == "a" and isinstance(message, Segment)
    assert bytes(message.payload) == bytes(sent.payload)
    assert not b.links.send("a", Beat(0, 0, "", 0, 0))  # a has said no hello


def test_what_must_not_be_held_up_goes_no_further_than_this_host(
    ends: Callable[[str], End],
) -> None:
    a, b = ends("a"), ends("b")
    beat = Beat(1, 2, "digest", 3, 4)
    assert not a.links.send_at_once("b", beat)
    introduced(a, b)
    assert a.links.send_at_once("b", beat) is b.links.is_local
    assert b.received() == [("a", beat)] * b.links.is_local


def test_what_must_not_be_held_up_waits_behind_nothing(tmp_path: Path) -> None:
    """As where the other peer stands still, so that the kernel takes no more."""
    a, b = (End(name, WAYS["host"].format(folder=tmp_path, name=name)) for name in "ab")
    introduced(a, b)
    beat, part = Beat(1, 2, "digest", 3, 4), StatePart(1, "digest", 0, 1, bytes(16 << 10))
    while a.links.send_at_once("b", part):
        pass
    assert a.links.send("b", part) and not a.links.send_at_once("b", beat)
    b.received()
    a.received()
    assert a.links.send_at_once("b", beat)
    a.close()
    b.close()


def test_what_is_on_its_way_shows_at_both_ends(tmp_path: Path) -> None:
    a, b = (End(name, WAYS["tcp"]) for name in "ab")
    relayed = ControlAndBulk(b"b", [f"ipc://{tmp_path}/no-relay"], b.context)
    here, there = LinksUnderway(b.links, relayed), LinksUnderway(a.links, relayed)
    introduced(a, b)
    assert not here.arrives_from("a") and not there.leaves_to("b")
    sent = a.segment(16 << 20)
    assert a.links.send("b", sent)
    until = time.monotonic() + 5
    while not here.arrives_from("a"):
        assert time.monotonic() < until and there.leaves_to("b")
        b.received(0.01)
    assert not here.arrives_from("c") and not there.leaves_to("c")
    came: list[tuple[str, Message]] = []
    while not came:
        assert time.monotonic() < until
        a.received(0.01)
        came += b.received(0.01)
    while there.leaves_to("b"):  # what was acknowledged
        assert time.monotonic() < until
        a.received(0.01)
    assert not here.arrives_from("a")
    relayed.close()
    a.close()
    b.close()


def test_without_the_number_nothing_is_taken(ends: Callable[[str], End]) -> None:
    """A stranger that found the endpoint, and one that was told another number, get nowhere."""
    a, b = ends("a"), ends("b")
    introduced(a, b)
    stranger = b.context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.ROUTING_ID, b"stranger")
    stranger.connect(b.links.endpoints[0])
    forged = Hello(tuple(b.links.endpoints), 12345)
    c = ends("c")
    for _ in range(3):
        for frame in (b"", b"K", b"K" + bytes(8), b"W", b"M", b"R", b"x" * 100):
            stranger.send(frame)
        stranger.send(b"M" + bytes(WIRE.encode(Beat(0, 0, "", 0, 0))[0]))
        c.links.on_hello("b", forged, 0.0)
        assert b.received() == [] and c.received() == []
    assert not c.links.send("b", Beat(0, 0, "", 0, 0))
    stranger.close(linger=0)


def test_garbage_of_a_peer_is_an_error_of_its_own(ends: Callable[[str], End]) -> None:
    """What follows it is read."""
    a, b = ends("a"), ends("b")
    introduced(a, b)
    stream = a.links._outgoing["b"].stream
    assert stream is not None
    beat = WIRE.encode(Beat(0, 0, "", 0, 0))[0]
    for frames in (
        *([b"x"], [b"Z" * 30], [b"M" * 30, b"x"], [beat, b""], [beat, b"x" * 100_000]),
        *([b"R"], [b"R" * 30], [b"R" * 60], [b"R" + bytes(40)], [b"R" + bytes(40), b"x"]),
    ):
        stream.send(frames)
        with pytest.raises(Malformed):
            b.received(5)
    assert a.links.send("b", Beat(1, 0, "", 0, 0))
    assert [message for _, message in b.received(0.3)] == [Beat(1, 0, "", 0, 0)]


def test_a_link_that_carries_nothing_is_given_up_for_a_while(ends: Callable[[str], End]) -> None:
    """Its other end stands still: after a check without a welcome all is for the relay."""
    a, b = ends("a"), ends("b")
    hello = introduced(a, b)
    assert a.links.send("b", a.segment(4))
    a.links.check("b", 10.0)
    a.links.tick(10.0 + WELCOME_S / 2)
    assert a.links.send("b", a.segment(4))
    a.links.tick(10.1 + WELCOME_S)
    assert not a.links.send("b", a.segment(4))
    b.received()
    a.links.on_hello("b", hello, 10.2 + WELCOME_S)  # too early
    b.received()
    a.received()
    assert not a.links.send("b", a.segment(4))
    a.links.on_hello("b", hello, 11.0 + WELCOME_S + MISTRUST_S)
    b.received()
    a.received()
    assert a.links.send("b", a.segment(4))


def test_a_welcome_that_comes_too_late_is_read_all_the_same(ends: Callable[[str], End]) -> None:
    """Else whoever waits for messages would be woken for it again and again."""
    a, b = ends("a"), ends("b")
    introduced(a, b)
    a.links.check("b", 10.0)
    a.links.tick(10.1 + WELCOME_S)
    assert not a.links.send("b", a.segment(4))
    b.received()
    a.received()
    assert a.watch.poll(100) == []
    assert not a.links.send("b", a.segment(4))


def test_a_look_that_found_room_is_done_with_when_that_is_filled(
    ends: Callable[[str], End],
) -> None:
    """Else all other ways would be asked as well, for each part of what is large."""
    a, b = ends("a"), ends("b")
    introduced(a, b)
    large = StatePart(1, "digest", 0, 1, bytes(16 * MEBIBYTE))
    assert a.links.send("b", large)
    came: list[tuple[str, Message]] = []
    looks, until = 0, time.monotonic() + 30
    while not came:
        assert time.monotonic() < until
        if a.watch.poll(20):
            looks += 1
            a.links.flush()
            assert a.watch.is_exhausted and a.links.has_all
        came = b.received(0.005)
    assert came == [("a", large)] and looks > 1


def test_one_that_sends_much_keeps_nobody_from_being_heard(ends: Callable[[str], End]) -> None:
    a, b, c = (ends(name) for name in "abc")
    for sender in (a, b):
        introduced(sender, c)
    for _ in range(30):
        assert a.links.send("c", a.segment(1000))
    assert b.links.send("c", b.segment(1000))
    c.watch.poll(100)
    heard = [message[0] for _ in range(10) if (message := c.links.receive()) is not None]
    assert "b" in heard


def test_a_check_of_a_link_that_works_changes_nothing(ends: Callable[[str], End]) -> None:
    a, b = ends("a"), ends("b")
    introduced(a, b)
    a.links.check("b", 10.0)
    b.received()
    a.received()
    a.links.tick(20.0)
    assert a.links.send("b", a.segment(4))


def test_a_peer_that_died_takes_nothing(ends: Callable[[str], End]) -> None:
    """The connection's end is seen at once, and the next message is for the relay."""
    a, b = ends("a"), ends("b")
    introduced(a, b)
    b.close()
    until = time.monotonic() + 5
    while a.links.send("b", a.segment(4)):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_hellos_are_not_said_all_the_time_and_old_peers_are_forgotten(
    ends: Callable[[str], End],
) -> None:
    a, b = ends("a"), ends("b")
    introduced(a, b)
    assert b.links.hello("a", HELLO_EVERY_S / 2) is None
    assert b.links.hello("a", HELLO_EVERY_S) is not None
    a.links.keep(["c"])
    assert not a.links.send("b", a.segment(4))
    b.links.keep([])
    assert b.links.hello("a", HELLO_EVERY_S) is not None


@pytest.mark.parametrize("bind", ["", "tcp://192.0.2.1:*"], ids=["nowhere", "in vain"])
def test_who_cannot_listen_can_send_all_the_same(bind: str) -> None:
    a, b = End("a", bind), End("b", "tcp://127.0.0.1:*")
    assert a.links.endpoints == []
    introduced(a, b)
    assert a.watch.poll(50) == []
    a.close()
    b.close()


def test_who_listens_nowhere_says_no_hello() -> None:
    one = End("a", "")
    assert one.links.hello("b", 0.0) is None
    one.close()


def test_a_vector_that_is_gone_is_not_read(ends: Callable[[str], End]) -> None:
    """The receiver was away while the sender went on with that memory: the segment is lost."""
    a, b = ends("a"), ends("b")
    if not b.links.endpoints[0].startswith("ipc"):
        pytest.skip("over TCP the bytes themselves are sent")
    introduced(a, b)
    segment = a.segment(1 << 20)
    assert a.links.send("b", segment)
    del segment
    for _ in range(2):
        a.pool.next_step(0)
    assert np.all(a.pool.take(1 << 18) == 1.0)
    with pytest.raises(Gone):
        b.received(5)
    assert b.links.traffic.gone == 1


@pytest.mark.parametrize(
    ("endpoints", "number"),
    [
        *(((), -1), (("tcp://127.0.0.1:1",) * 5, 1), (("inproc://x",), 1), (("",), 1)),
        *((("ipc://\0",), 1), (("tcp://a\nb:1",), 1), (("pgm://1.2.3.4:5",), 1)),
    ],
)
def test_a_hello_that_cannot_be_is_malformed(endpoints: tuple[str, ...], number: int) -> None:
    """It is refused before it is used, by whoever gets it."""
    with pytest.raises(ValueError, match="hello"):
        Hello(endpoints, number)
    honest = Hello(("tcp://127.0.0.1:1",), 1)
    forged = object.__new__(Hello)
    object.__setattr__(forged, "endpoints", endpoints)
    object.__setattr__(forged, "number", number)
    assert WIRE.decode(WIRE.encode(honest)) == honest
    with pytest.raises(Malformed):
        WIRE.decode(WIRE.encode(forged))


@pytest.mark.parametrize("endpoint", ["tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:999999"])
def test_an_endpoint_that_is_none_makes_no_link(endpoint: str) -> None:
    one = End("a", "")
    one.links.on_hello("b", Hello((endpoint,), 1), 0.0)
    assert not one.links.send("b", Beat(0, 0, "", 0, 0))
    one.close()
