"""What a relay passes on while it comes: real connections, of which some stop in the middle."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2p.transport.exchange import PIPED_FROM_BYTES, Exchange
from p2p.transport.framing import HEADER_LIMIT_BYTES, Broken, Target
from p2p.transport.passing import PART_BYTES, Passing, addressed, opened
from p2p.transport.pipe import Pipes
from p2p.transport.relayed import READING
from p2p.transport.stream import Address, Connection
from p2p.transport.watch import Watch
from tests.relay_process import until as wait_until

MEBIBYTE = 1 << 20
PATIENCE_S = 0.02
"""Short, so that what is in a pipe often leaves it."""
Message = tuple[bytes, bytes, memoryview | bytearray]
"""Of whom, its header, its payload."""


@dataclass
class Counters:
    messages: int = 0
    bytes: int = 0
    dropped: int = 0


def begin(header: bytes, size: int | None) -> tuple[Message, Target]:
    source, rest = opened(header)
    if not rest.startswith(b"taken"):
        payload = memoryview(bytearray(size or 0))
        return (source, rest, payload), payload
    taken = bytearray()

    def take(start: int, piece: memoryview) -> None:
        assert start == len(taken) and start % 4 == 0 and len(piece) > 0
        taken.extend(piece)

    return (source, rest, taken), take


class Hub:
    """An exchange and whom it serves, in one thread."""

    def __init__(self, address: Address, seals: bool, queue_bytes: int = 64 * MEBIBYTE) -> None:
        self.address = address
        self.watch = Watch()
        self.counters = Counters()
        self.elsewhere: list[tuple[bytes, bytes, bytes, bytes]] = []
        self.exchange = Exchange(
            [address], self.watch, seals, queue_bytes, self.counters, self._goes_elsewhere
        )
        self.peers: dict[bytes, Connection[Message]] = {}
        self.came: dict[bytes, list[Message]] = {}
        self.stopped: set[bytes] = set()
        """Who sends nothing more,"""
        self.deaf: set[bytes] = set()
        """and who reads nothing."""
        self.ticks = True

    def join(self, *names: bytes) -> None:
        for name in names:
            invitation = self.exchange.entrance.invite(name)
            address = self.address
            if isinstance(address, tuple):
                address = address[0], invitation.port
            self.peers[name] = Connection.dialled(address, invitation, self.watch, begin, READING)
            self.came[name] = []
            self.until(lambda name=name: name in self.exchange.entrance.named)

    def send(self, source: bytes, destination: bytes, header: bytes, payload: bytes) -> None:
        self.peers[source].send([addressed(destination, header), payload])

    def leave(self, name: bytes) -> None:
        self.peers.pop(name).close()

    def turn(self) -> None:
        found = self.watch.poll(5)
        ours = {each.fileno() for each in self.peers.values()}
        for descriptor, _ in found:
            if isinstance(descriptor, int) and descriptor not in ours:
                self.exchange.serve(descriptor)
        if self.ticks:
            self.exchange.tick()
        for name, peer in [*self.peers.items()]:
            peer.hear(name not in self.deaf)
            peer.tick(time.monotonic())
            if name not in self.stopped:
                peer.flush()
            while name not in self.deaf and (message := peer.receive()) is not None:
                self.came[name].append(message)

    def until(self, condition: Callable[[], object]) -> None:
        def is_so() -> object:
            self.turn()
            return condition()

        wait_until(is_so, 20)

    def begun(self, source: bytes, destination: bytes, payload: bytes, header: bytes = b"") -> None:
        """Sends a message and stops in the middle of it, when the destination has some of it."""
        self.send(source, destination, header or b"header", payload)
        self.until(lambda: [each for each in self.peers[destination].arriving if each[0] == source])
        self.stopped.add(source)

    @property
    def holds(self) -> int:
        """What it has for anybody, in bytes, or in numbers of messages and channels."""
        queues = self.exchange._queues.values()
        held = [each.room._bytes + len(each.lines) + len(each.held) for each in queues]
        return sum(held) + sum(len(each.channels) for each in queues)

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()
        self.exchange.entrance.close()

    def _goes_elsewhere(
        self, source: bytes, destination: bytes, header: bytes, payload: memoryview
    ) -> None:
        self.elsewhere.append((source, destination, header, bytes(payload)))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.transport.passing.PIPE_PATIENCE_S", PATIENCE_S)


@pytest.fixture(params=["unix", "tcp", "sealed"])
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be too long for a socket
        address = Path(folder) / "socket" if request.param == "unix" else ("127.0.0.1", 0)
        made = Hub(address, seals=request.param == "sealed")
        made.join(b"a", b"b", b"c")
        yield made
        made.close()


LONG = 24 * MEBIBYTE + 7
"""More than the kernel keeps on the way, and no multiple of anything."""


@pytest.mark.parametrize("header", [b"header", b"taken while it comes"])
def test_whose_source_stops_holds_up_no_other(hub: Hub, header: bytes) -> None:
    slow, other = os.urandom(LONG), os.urandom(MEBIBYTE)
    hub.begun(b"a", b"c", slow, header)
    for _ in range(5):
        hub.send(b"b", b"c", header, other)
        hub.until(lambda: hub.came[b"c"])
        assert hub.came[b"c"].pop() == (b"b", header, other)
    hub.stopped.clear()
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(b"a", header, slow)]
    assert hub.counters == Counters(6, len(slow) + 5 * len(other) + 6 * len(header))
    hub.until(lambda: not hub.holds)


def test_what_stands_still_does_not_arrive(hub: Hub) -> None:
    """Though something else does; then it is given up, and whoever sent it is heard again."""
    hub.begun(b"a", b"c", os.urandom(LONG))
    hub.until(lambda: not hub.peers[b"c"].arriving)
    hub.begun(b"b", b"c", os.urandom(LONG))
    assert [each[0] for each in hub.peers[b"c"].arriving] == [b"b"]
    hub.until(lambda: not hub.peers[b"c"]._incoming._parted)
    hub.until(lambda: not hub.holds)
    assert hub.counters.dropped == 2
    hub.stopped.clear()
    hub.send(b"a", b"c", b"next", b"x" * MEBIBYTE)
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(b"a", b"next", b"x" * MEBIBYTE)]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_source_that_dies_in_the_middle(hub: Hub, deaf: bool) -> None:
    """Costs its one message; under its name a new connection is as good as the first."""
    hub.begun(b"a", b"c", os.urandom(LONG))
    if deaf:
        hub.deaf.add(b"c")
        hub.stopped.clear()
        hub.until(lambda: hub.exchange._queues[b"c"].leaving)
    hub.leave(b"a")
    hub.until(lambda: hub.counters.dropped == 1)
    for _ in range(100):
        hub.turn()
    hub.stopped.clear()
    hub.deaf.clear()
    hub.until(lambda: not hub.holds)
    hub.join(b"a")
    sent = os.urandom(LONG)
    hub.send(b"a", b"c", b"header", sent)
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(b"a", b"header", sent)] and hub.counters.dropped == 1


def test_a_destination_that_dies_in_the_middle(hub: Hub) -> None:
    """Costs what was for it; its sources go on."""
    hub.begun(b"a", b"c", os.urandom(LONG))
    hub.leave(b"c")
    hub.stopped.clear()
    hub.send(b"a", b"b", b"header", b"x" * MEBIBYTE)
    hub.until(lambda: hub.came[b"b"])
    assert hub.counters.dropped == 1
    hub.join(b"c")
    hub.send(b"a", b"c", b"header", b"x" * MEBIBYTE)
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(b"a", b"header", b"x" * MEBIBYTE)] and hub.counters.dropped == 1


def test_who_waited_for_one_that_died_is_heard_again_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only at the relay's next tick."""
    # on a busy machine the second message comes later than anyone has patience
    monkeypatch.setattr("p2p.transport.exchange.PATIENCE_S", 60.0)
    hub.join(b"a", b"b", b"dies")
    hub.deaf.add(b"dies")
    source = hub.exchange.entrance.named[b"a"]
    for _ in range(2):
        hub.send(b"a", b"dies", b"header", bytes(24 * MEBIBYTE))
    hub.until(lambda: not source.hears)
    hub.ticks = False
    hub.leave(b"dies")
    hub.send(b"a", b"b", b"header", b"later")
    hub.until(lambda: hub.came[b"b"])


def test_who_does_not_read_keeps_nobody_from_others(hub: Hub) -> None:
    hub.deaf.add(b"c")
    sent = os.urandom(LONG)
    hub.send(b"a", b"c", b"header", sent)
    hub.until(lambda: hub.exchange._queues)
    for _ in range(20):
        hub.turn()
    time.sleep(2 * PATIENCE_S)
    hub.turn()
    assert hub.exchange.entrance.named[b"a"].hears
    for _ in range(5):
        hub.send(b"a", b"b", b"header", b"x" * MEBIBYTE)
        hub.until(lambda: hub.came[b"b"])
        hub.came[b"b"].clear()
    hub.deaf.clear()
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(b"a", b"header", sent)] and hub.counters.dropped == 0
    hub.until(lambda: not hub.holds)


def test_what_is_taken_at_once_stays_in_its_pipe() -> None:
    """To its end: a message that does not wait is never in the relay's memory."""
    made = Hub(("127.0.0.1", 0), seals=False)
    try:
        made.join(b"a", b"c")
        left = []
        leave = Passing.leave_pipe

        def counted(passing: Passing, pipes: Pipes) -> memoryview:
            left.append(passing.come)
            return leave(passing, pipes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Passing, "leave_pipe", counted)
            patch.setattr("p2p.transport.passing.PIPE_PATIENCE_S", 60.0)
            made.send(b"a", b"c", b"header", bytes(3 * MEBIBYTE))
            made.until(lambda: made.came[b"c"])
        assert not left or made.exchange._pipes._limit == 0
    finally:
        made.close()


def test_what_is_long_does_not_go_before_all_others(hub: Hub) -> None:
    """Though it was there first, and whole."""
    hub.deaf.add(b"c")
    hub.send(b"a", b"c", b"long", bytes(LONG))
    hub.until(lambda: hub.counters.messages == 1)
    hub.send(b"b", b"c", b"short", bytes(MEBIBYTE))
    hub.until(lambda: hub.counters.messages == 2)
    hub.deaf.clear()
    hub.until(lambda: len(hub.came[b"c"]) == 2)
    assert [each[1] for each in hub.came[b"c"]] == [b"short", b"long"]


def test_what_has_stopped_leaves_its_room_to_others() -> None:
    made = Hub(("127.0.0.1", 0), seals=True, queue_bytes=2 * LONG + MEBIBYTE)
    try:
        made.join(b"a", b"b", b"c", b"d")
        made.begun(b"a", b"c", bytes(LONG))
        made.begun(b"b", b"c", bytes(LONG))
        made.until(lambda: made.counters.dropped == 2)
        made.send(b"d", b"c", b"header", bytes(LONG))
        made.until(lambda: made.came[b"c"])
        assert made.counters.dropped == 2
    finally:
        made.close()


def test_the_smallest_messages_are_bounded_as_well() -> None:
    made = Hub(("127.0.0.1", 0), seals=False, queue_bytes=MEBIBYTE)
    try:
        made.join(b"a", b"c")
        made.deaf.add(b"c")
        for _ in range(30):
            for _ in range(1000):
                made.send(b"a", b"c", b"x" * 100, b"")
            made.turn()
        made.until(lambda: made.counters.dropped > 1000)
        assert sum(map(len, made.exchange._queues[b"c"].lines.values())) <= 512
    finally:
        made.close()


def test_a_header_that_grows_too_long_is_not_passed_on(hub: Hub) -> None:
    """With the source's name in the place of the destination's."""
    name = b"n" * 200
    hub.join(name)
    hub.send(name, b"c", b"x" * (HEADER_LIMIT_BYTES - 10), b"payload")
    hub.until(lambda: hub.counters.dropped == 1)
    hub.send(name, b"c", b"header", b"payload")
    hub.until(lambda: hub.came[b"c"])
    assert hub.came[b"c"] == [(name, b"header", b"payload")]


def test_what_is_for_nobody_here_goes_elsewhere_whole(hub: Hub) -> None:
    for size in (1, PART_BYTES, LONG):
        sent = os.urandom(size)
        hub.send(b"a", b"nobody", b"header", sent)
        hub.until(lambda: hub.elsewhere)
        assert hub.elsewhere.pop() == (b"a", b"nobody", b"header", sent)


def test_garbage_in_the_middle_of_parts_ends_its_connection_alone(hub: Hub) -> None:
    """A peer may send none in parts, and no more than it said."""
    hub.begun(b"a", b"c", os.urandom(LONG))
    with suppress(Broken):
        hub.peers[b"b"].send_beginning(7, addressed(b"c", b"header"), 10)
    hub.until(lambda: b"b" not in hub.exchange.entrance.named)
    hub.peers.pop(b"b").close()
    hub.stopped.clear()
    hub.until(lambda: hub.came[b"c"])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_stops_and_goes_on_everything_arrives(hub: Hub, seed: int) -> None:
    """In the order in which one sent it to another; at the end nothing is left in the relay."""
    draw = random.Random(seed)
    names = [*hub.peers]
    sent: dict[tuple[bytes, bytes], list[bytes]] = {}
    end = time.monotonic() + 60
    for number in range(40):
        source, destination = draw.choice(names), draw.choice(names)
        size = draw.choice([1, 1000, PART_BYTES, 3 * PART_BYTES + 3, 3 * MEBIBYTE + 1])
        payload = draw.randbytes(size)
        header = draw.choice([b"header", b"taken"]) + b"%d" % number
        sent.setdefault((source, destination), []).append(payload)
        hub.send(source, destination, header, payload)
        hub.stopped = {each for each in names if draw.random() < 0.3}
        if draw.random() < 0.3:  # long enough that the kernel's buffers are full
            hub.deaf = {each for each in names if draw.random() < 0.5}
        for _ in range(draw.randrange(6)):
            hub.turn()
        if draw.random() < 0.3:
            time.sleep(2 * PATIENCE_S)
            hub.exchange.tick()
        assert time.monotonic() < end
    hub.stopped.clear()
    hub.deaf.clear()
    hub.until(lambda: sum(map(len, hub.came.values())) == 40)
    for destination in names:
        for source in names:
            came = [bytes(each[2]) for each in hub.came[destination] if each[0] == source]
            assert came == sent.get((source, destination), [])
    hub.until(lambda: not hub.holds)
    assert hub.counters.dropped == 0 and not hub.exchange._pipes.used


def test_it_does_not_matter_where_the_kernel_takes_no_more(hub: Hub) -> None:
    """In the middle of a part, or of what comes before it; what is in a pipe then leaves it."""
    sizes = range(PIPED_FROM_BYTES, 2 * PIPED_FROM_BYTES, 40_001)
    for size in sizes:
        name = b"c%d" % size
        hub.join(name)
        hub.deaf.add(name)
        for number in range(10):
            hub.send(b"a", name, b"%d" % number, bytes([number]) * size)
            for _ in range(3):
                hub.turn()
    for _ in range(3):
        time.sleep(2 * PATIENCE_S)
        hub.turn()
    hub.deaf.clear()
    hub.until(lambda: sum(map(len, hub.came.values())) == 10 * len(sizes))
    for size in sizes:
        came = hub.came[b"c%d" % size]
        assert came == [(b"a", b"%d" % each, bytes([each]) * size) for each in range(10)]
    assert hub.counters.dropped == 0
    pipes = hub.exchange._pipes
    assert not pipes.used and bool(pipes._empty) == (pipes._limit > 0)
