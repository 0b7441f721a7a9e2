"""Large messages through real relays, over connections beside ZeroMQ's, or else through that."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD

import msgpack
import pytest
import zmq

from p2p.messages import KINDS, Message, Segment
from p2p.transport.exchange import UNIX_SUFFIX
from p2p.transport.keys import PEER_FILE, RELAY_FILE, PeerKeys, new_keys, write_keys
from p2p.transport.link import STREAMED_FROM_BYTES, ControlAndBulk, Link, relay_bulk
from p2p.transport.relayed import STALLED_S, Received
from p2p.transport.stream import Connection, are_unix_sockets_fast
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed, WireFormat
from tests.relay_process import RelayProcess
from tests.relay_process import until as wait_until

WIRE: WireFormat[Message] = WireFormat(KINDS)
MEBIBYTE = 1 << 20


class Peer:
    """One peer's link, with all that it is told."""

    def __init__(self, name: str, endpoints: list[str], keys: PeerKeys | None = None) -> None:
        self.name = name
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.watch = Watch()
        self.link = ControlAndBulk(name.encode(), endpoints, self.context, keys)
        self.lent: memoryview | None = None
        self.came: list[tuple[bytes, Message]] = []
        self.streamed = 0
        self.link.stream(self.watch, WIRE, lambda segment: self.lent)

    @property
    def streams(self) -> int:
        """How many connections are open."""
        streams = self.link.bulk.streams
        assert streams is not None
        ways = [way.connection for way in streams._ways]
        return len([each for each in ways if each is not None and each.is_open])

    def turn(self) -> None:
        self.watch.poll(10)
        self.link.tick(time.monotonic())
        while (received := self.link.receive()) is not None:
            self.came.append((received[0], WIRE.decode(received[1], self.link.is_guarded)))
        while (streamed := self.link.receive_streamed()) is not None:
            self.came.append(streamed)
            self.streamed += 1

    def settle(self) -> None:
        """Nothing is on its way to itself any more."""
        quiet = time.monotonic() + 0.1
        while time.monotonic() < quiet:
            self.turn()
        self.came.clear()

    def send(self, to: str, segment: Segment) -> bool:
        return relay_bulk(self.link, WIRE, to, segment)

    def close(self) -> None:
        self.link.close()
        self.context.destroy(linger=0)


def until(condition: Callable[[], object], *peers: Peer, seconds: float = 15.0) -> None:
    def has_come() -> object:
        if not (found := condition()):
            for peer in peers:
                peer.turn()
        return found

    wait_until(has_come, seconds)


def in_kernel(connection: Connection[Received]) -> int:
    """Bytes that have come and not been received."""
    told = array("i", [0])
    ioctl(connection.fileno(), FIONREAD, told)
    return told[0]


def segment(size: int, unit: int = 0) -> Segment:
    return Segment(1, 2, 3, unit, 5, "digest", os.urandom(size))


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders can be too long for the name of a socket
    made = Path(tempfile.mkdtemp(prefix="relay-"))
    yield made
    shutil.rmtree(made)


FAST_UNIX_SOCKETS = pytest.mark.skipif(
    not are_unix_sockets_fast(), reason="the kernel allows small buffers only (net.core.wmem_max)"
)
WAYS = [pytest.param("ipc", marks=FAST_UNIX_SOCKETS), "tcp", "keys"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def keys(way: str, folder: Path) -> PeerKeys | None:
    if way != "keys":
        return None
    write_keys(new_keys(), folder / "keys")
    return PeerKeys.read(folder / "keys" / PEER_FILE)


@pytest.fixture
def relay(way: str, keys: PeerKeys | None, folder: Path) -> Iterator[RelayProcess]:
    endpoint = None if way == "ipc" else "tcp://127.0.0.1:*"
    options = ["--keys", str(folder / "keys" / RELAY_FILE)] if keys is not None else []
    made = RelayProcess(folder, "a", endpoint, *options)
    yield made
    made.kill()


@pytest.fixture
def peers(relay: RelayProcess, keys: PeerKeys | None) -> Iterator[Callable[[str], Peer]]:
    made: list[Peer] = []

    def make(name: str) -> Peer:
        made.append(Peer(name, [relay.endpoint], keys))
        return made[-1]

    yield make
    for each in made:
        each.close()


def joined(*peers: Peer, streams: int = 1) -> None:
    """Until all have their connections, and the relays know it."""
    for peer in peers:
        before = peer.streamed

        def is_heard(peer: Peer = peer, before: int = before) -> bool:
            if peer.streams == streams:
                peer.send(peer.name, segment(STREAMED_FROM_BYTES))
            return peer.streamed >= before + streams * 2

        until(is_heard, peer)
    for peer in peers:
        peer.settle()


def stats(relay: RelayProcess, keys: PeerKeys | None) -> dict[str, int]:
    link = Link(b"asks", [relay.endpoint], keys=keys)
    try:
        until(lambda: link.send(b"relay", [b"stats"]))
        assert link.wait(10_000)
        answer = link.receive()
        assert answer is not None
        found: dict[str, int] = msgpack.unpackb(answer[1][0])
        return found
    finally:
        link.close()


def test_what_is_large_arrives_beside_zeromq(
    peers: Callable[[str], Peer], relay: RelayProcess, keys: PeerKeys | None
) -> None:
    """Of every size and in both directions; what is small goes through ZeroMQ as ever."""
    one, two = peers("one"), peers("two")
    joined(one, two)
    zeromq_before = one.link.bulk.traffic.sent
    for size in (STREAMED_FROM_BYTES, 300_001, 5 * MEBIBYTE):
        for a, b in ((one, two), (two, one)):
            sent = segment(size)
            assert a.send(b.name, sent)
            until(lambda b=b: b.came, one, two)
            assert b.came.pop() == (a.name.encode(), sent)
    assert one.link.bulk.traffic.sent == zeromq_before
    assert stats(relay, keys)["bytes"] > 10 * MEBIBYTE
    small = segment(STREAMED_FROM_BYTES - 1)
    until(lambda: one.send("two", small), one, two)
    until(lambda: two.came, one, two)
    assert two.came.pop() == (b"one", small) and one.link.bulk.traffic.sent == zeromq_before + 1


def test_what_came_with_something_before_it_is_told_of(peers: Callable[[str], Peer]) -> None:
    """It is in this process already, so no look finds it: whoever stops in between has to know."""
    one, two = peers("one"), peers("two")
    joined(one, two)
    sent = [segment(64, unit) for unit in range(20)]
    for each in sent:
        header, payload = WIRE.encode(each, hashed=False)
        assert one.link.send_streamed(b"two", b"garbage" if each is sent[9] else header, payload)
    assert two.link.bulk.streams is not None
    connection = two.link.bulk.streams._ways[0].connection
    assert connection is not None
    wait_until(lambda: in_kernel(connection) > sum(len(each.payload) for each in sent))
    two.watch.poll(0)
    first = two.link.receive_streamed()
    assert first is not None and two.watch.is_exhausted and two.link.has_come
    two.came.append(first)
    with pytest.raises(Malformed):
        until(lambda: len(two.came) == len(sent), one, two)
    del sent[9]
    until(lambda: len(two.came) == len(sent), one, two)
    assert two.came == [(b"one", each) for each in sent] and not two.link.has_come


def test_a_payload_is_written_where_it_belongs(peers: Callable[[str], Peer]) -> None:
    one, two = peers("one"), peers("two")
    joined(one, two)
    sent, memory = segment(MEBIBYTE), bytearray(MEBIBYTE)
    two.lent = memoryview(memory)
    assert one.send("two", sent)
    until(lambda: two.came, one, two)
    ((_, message),) = two.came
    assert isinstance(message, Segment) and message.payload is two.lent
    assert bytes(memory) == sent.payload


def test_a_relay_that_returns_is_found_again(
    peers: Callable[[str], Peer], relay: RelayProcess
) -> None:
    """Its end is seen, and nothing is sent to it meanwhile; then everything is as before."""
    one, two = peers("one"), peers("two")
    joined(one, two)
    relay.kill()
    until(lambda: one.streams == two.streams == 0, one, two)
    assert not one.send("two", segment(MEBIBYTE))
    relay.start()
    joined(one, two)
    sent = segment(MEBIBYTE)
    assert one.send("two", sent)
    until(lambda: two.came, one, two)
    assert two.came == [(b"one", sent)]


def test_whom_no_connection_reaches_zeromq_does(
    peers: Callable[[str], Peer], relay: RelayProcess
) -> None:
    """One of the two has no connection, since it cannot reach the port; it gets all the same."""
    one, two = peers("one"), peers("two")
    two.link.bulk.streams = None
    until(lambda: one.streams == 1, one, two)
    for a, b in ((one, two), (two, one)):
        sent = segment(3 * MEBIBYTE)
        until(lambda a=a, b=b, sent=sent: a.send(b.name, sent), one, two)
        until(lambda b=b: b.came, one, two)
        assert b.came == [(a.name.encode(), sent)]


@pytest.mark.parametrize("way", ["ipc"], indirect=True)
def test_a_relay_without_them_serves_as_well(peers: Callable[[str], Peer], folder: Path) -> None:
    """Its socket for them is gone, as where the kernel allows small buffers only."""
    Path(f"{folder}/a{UNIX_SUFFIX}").unlink(missing_ok=True)
    one, two = peers("one"), peers("two")
    sent = segment(3 * MEBIBYTE)
    until(lambda: one.send("two", sent) and (two.turn() or two.came), one)
    assert one.streams == 0 and (b"one", sent) in two.came


@pytest.mark.parametrize("how", ["does not read", "is stopped"])
def test_a_peer_that_does_not_read_harms_nobody(
    how: str, peers: Callable[[str], Peer], relay: RelayProcess, keys: PeerKeys | None, folder: Path
) -> None:
    """1,000 MiB for a peer that never reads: the relay's memory stays small, others go on."""
    sender, reader = peers("sender"), peers("reader")
    script = (
        "import sys, time; sys.path[:0] = sys.argv[1:2]\n"
        "from test_relayed import *\n"
        "keys = PeerKeys.read(Path(sys.argv[3])) if sys.argv[3] else None\n"
        "peer = Peer('stuck', [sys.argv[2]], keys)\n"
        "joined(peer)\n"
        "print(flush=True); time.sleep(100)\n"
    )
    file = str(folder / "keys" / PEER_FILE) if keys is not None else ""
    command = [sys.executable, "-c", script, str(Path(__file__).parent), relay.endpoint, file]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            if how == "is stopped":
                process.send_signal(signal.SIGSTOP)
            joined(sender, reader)
            highest, sent = 0, segment(MEBIBYTE)
            for index in range(1000):
                until(lambda: sender.send("stuck", sent), sender)
                if index % 50 == 0:
                    until(lambda: sender.send("reader", sent), sender)
                    until(lambda: reader.came, sender, reader, seconds=2)
                    assert reader.came.pop() == (b"sender", sent)
                    highest = max(highest, relay.memory_bytes())
            counted = stats(relay, keys)
            assert counted["dropped"] + counted["unknown"] > 700
            assert max(highest, relay.memory_bytes()) < 250 * MEBIBYTE
            # the room that is left is for others, unless it was given up by now
            before = counted["messages"] + counted["unknown"]
            assert reader.send("stuck", sent)

            def is_taken() -> bool:
                now = stats(relay, keys)
                return now["messages"] + now["unknown"] > before

            until(is_taken, sender, reader)
        finally:
            process.kill()


def test_garbage_of_a_peer_harms_nobody(peers: Callable[[str], Peer]) -> None:
    """It arrives as an error of its own; the connections stay."""
    one, two = peers("one"), peers("two")
    joined(one, two)
    streams = one.link.bulk.streams
    assert streams is not None
    for header in (b"garbage", b"\xff" * 300):
        assert streams.send(b"two/b", header, bytes(STREAMED_FROM_BYTES))
        with pytest.raises(Malformed):
            until(lambda: two.came, one, two)
    connection = streams._ways[0].connection
    assert connection is not None
    for header in (b"\xffshort", b"\0", b"\x03two"):
        connection.send([header, b"payload"])  # to nobody
    sent = segment(MEBIBYTE)
    assert one.send("two", sent)
    until(lambda: two.came, one, two)
    assert two.came == [(b"one", sent)] and one.streams == two.streams == 1


@FAST_UNIX_SOCKETS
def test_who_reads_slowly_loses_nothing(folder: Path) -> None:
    """Far more than the relay holds comes at once: its source is held back, and others are not."""
    relay = RelayProcess(folder, "a", None, "--queue-bytes", str(8 * MEBIBYTE))
    fast, slow, other = (Peer(name, [relay.endpoint]) for name in ("fast", "slow", "other"))
    try:
        joined(fast, slow, other)
        memory = relay.memory_bytes()
        # made before, for while they are sent nobody reads, which is forgiven for so long only
        sent = [WIRE.encode(segment(MEBIBYTE, unit), hashed=False) for unit in range(50)]
        for header, payload in sent:
            assert fast.link.send_streamed(b"slow", header, payload)
        units, end = [], time.monotonic() + 60
        while len(units) < 50:
            assert time.monotonic() < end
            fast.turn()
            slow.watch.poll(0)
            received = slow.link.receive_streamed()
            if received is not None:
                assert isinstance(received[1], Segment)
                units.append(received[1].unit)
                time.sleep(0.05)
                assert other.send("fast", segment(MEBIBYTE))
                until(lambda: fast.came, fast, other, seconds=5)
                fast.came.clear()
                assert relay.memory_bytes() - memory < 30 * MEBIBYTE
        assert units == [*range(50)] and stats(relay, None)["dropped"] == 0
    finally:
        for peer in (fast, slow, other):
            peer.close()
        relay.kill()


class Trickle:
    """`readv`, of one socket little at once, 5 MiB a second: what takes 0.8 s for one of 4 MiB."""

    def __init__(self, slow: int, meanwhile: Callable[[], object]) -> None:
        self._slow = slow
        self._meanwhile = meanwhile
        self._readv = os.readv
        self._next = time.monotonic()

    def __call__(self, descriptor: int, rooms: list[memoryview]) -> int:
        if descriptor != self._slow:
            return self._readv(descriptor, rooms)
        self._meanwhile()
        time.sleep(max(0.0, self._next - time.monotonic()))
        size = self._readv(descriptor, [rooms[0][: MEBIBYTE // 4]])
        self._next = max(self._next, time.monotonic() - 0.2) + size / (5 * MEBIBYTE)
        return size


@FAST_UNIX_SOCKETS
def test_who_takes_seconds_for_a_message_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a slow link: that it takes something shows before it has taken a whole message."""
    relay = RelayProcess(folder, "a", None, "--queue-bytes", str(24 * MEBIBYTE))
    fast, slow = (Peer(name, [relay.endpoint]) for name in ("fast", "slow"))
    try:
        joined(fast, slow)
        for unit in range(8):
            assert fast.send("slow", segment(4 * MEBIBYTE, unit))
        streams = slow.link.bulk.streams
        assert streams is not None
        connection = streams._ways[0].connection
        assert connection is not None
        seen: set[tuple[bool, bool]] = set()

        def meanwhile() -> None:
            fast.turn()
            seen.add((fast.link.leaves_to(b"slow"), slow.link.arrives_from(b"fast")))
            assert not fast.link.leaves_to(b"other") and not slow.link.arrives_from(b"other")

        monkeypatch.setattr(os, "readv", Trickle(connection.fileno(), meanwhile))
        until(lambda: len(slow.came) == 8, fast, slow, seconds=60)
        units = [message.unit for _, message in slow.came if isinstance(message, Segment)]
        assert units == [*range(8)] and stats(relay, None)["dropped"] == 0
        assert (True, True) in seen
        assert not fast.link.leaves_to(b"slow") and not slow.link.arrives
    finally:
        for peer in (fast, slow):
            peer.close()
        relay.kill()


@pytest.mark.parametrize("way", ["keys"], indirect=True)
def test_a_relay_that_stands_still_is_left(
    peers: Callable[[str], Peer], relay: RelayProcess
) -> None:
    """What is sent to it is bounded, and after some seconds the connection is given up."""
    one = peers("one")
    joined(one)
    relay.process.send_signal(signal.SIGSTOP)
    try:
        taken = 0
        while one.send("two", segment(MEBIBYTE)) and taken < 500:
            taken += 1
            one.turn()
        assert taken < 200
        until(lambda: one.streams == 0, one, seconds=STALLED_S + 10)
    finally:
        relay.process.send_signal(signal.SIGCONT)
    joined(one)


def test_what_keys_guard_needs_no_checksum_whichever_way_it_goes() -> None:
    """So what one peer sends over a connection can reach another through ZeroMQ."""
    keys = new_keys()[1]
    links = [
        ControlAndBulk(b"one", [endpoint], keys=key)
        for endpoint in ("ipc:///nowhere", "tcp://127.0.0.1:1", "tcp://192.0.2.1:1")
        for key in (keys, None)
    ]
    assert [link.is_guarded for link in links] == [True, True, True, True, True, False]
    for link in links:
        link.close()


@FAST_UNIX_SOCKETS
def test_two_relays_share_what_is_large(folder: Path) -> None:
    """And with one of them dead the other has it all."""
    relays = [RelayProcess(folder, name) for name in ("a", "b")]
    one, two = (Peer(name, [relay.endpoint for relay in relays]) for name in ("one", "two"))
    try:
        joined(one, two, streams=2)
        before = [stats(relay, None)["messages"] for relay in relays]
        for unit in range(20):
            assert one.send("two", segment(MEBIBYTE, unit))
        until(lambda: len(two.came) == 20, one, two)
        after = [stats(relay, None)["messages"] for relay in relays]
        assert [late - early for early, late in zip(before, after, strict=True)] == [10, 10]
        relays[0].kill()
        until(lambda: one.streams == two.streams == 1, one, two)
        for unit in range(20):
            assert one.send("two", segment(MEBIBYTE, unit))
        until(lambda: len(two.came) == 40, one, two)
    finally:
        one.close()
        two.close()
        for relay in relays:
            relay.kill()


def test_a_port_that_is_taken_is_said() -> None:
    """One line, and the exit code of a wrong input."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "p2p.transport.relay", "--bind", "tcp://127.0.0.1:*"]
        answer = subprocess.run(
            [*command, "--stream-port", str(port)], capture_output=True, text=True, timeout=20
        )
    assert answer.returncode == 2
    said = f"relay: the relay cannot listen at port {port}: Address already in use\n"
    assert answer.stderr == said
