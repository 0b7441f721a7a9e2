"""The wire refuses what is not whole, and real relays lose nothing but what they say they lose."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgpack
import pytest
import zmq
from xxhash import xxh3_64_intdigest

from p2p.messages import KINDS, Message, Segment
from p2p.transport.hosts import is_loopback, is_within_host
from p2p.transport.link import ControlAndBulk, Link
from p2p.transport.wire import (
    _PREFIX,
    ITEMS_LIMIT,
    TEXT_LIMIT,
    VERSION,
    Damaged,
    Malformed,
    WireFormat,
)
from tests.relay_process import RelayProcess, until

MEBIBYTE = 1 << 20


# --- the wire format -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Everything:
    number: int
    real: float
    text: str
    octets: bytes
    flag: bool
    nothing: None
    maybe: int | None
    kind: Literal["ring", "butterfly", 3]
    pair: tuple[int, str]
    names: tuple[str, ...]
    inner: Inner
    inners: tuple[Inner, ...]
    nested: tuple[tuple[int, ...], ...]
    perhaps: Inner | None


@dataclass(frozen=True, slots=True)
class Bulk:
    step: int
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Empty:
    pass


EVERYTHING = Everything(
    number=-(1 << 63),
    real=0.1,
    text="żółć",
    octets=b"\x00\xff",
    flag=False,
    nothing=None,
    maybe=None,
    kind=3,
    pair=(1, "x"),
    names=(),
    inner=Inner("a", (1.0, float("inf"))),
    inners=(Inner("b", ()), Inner("c", (2.5,))),
    nested=((1, 2), (), (3,)),
    perhaps=Inner("d", ()),
)
WIRE = WireFormat[Any]([Everything, Bulk, Empty])


def test_every_annotation_survives_the_round_trip() -> None:
    """Each kind of field comes back equal and of the same type."""
    assert WIRE.decode(WIRE.encode(EVERYTHING)) == EVERYTHING
    assert WIRE.decode(WIRE.encode(Empty())) == Empty()


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * MEBIBYTE])
@pytest.mark.parametrize("made", [bytes, bytearray, memoryview])
def test_a_payload_travels_uncopied(size: int, made: Callable[[bytes], Any]) -> None:
    """The second frame is the caller's own buffer, and what is decoded is the frame's."""
    payload = made(os.urandom(size))
    frames = WIRE.encode(Bulk(7, payload))
    decoded = WIRE.decode(frames)
    assert decoded == Bulk(7, payload)
    if size and made is bytearray:
        payload[0] ^= 1
        assert decoded.payload == payload


def test_a_payload_without_a_checksum_is_for_guarded_ways_only() -> None:
    """There it is taken as it is; one that has a checksum is held to it everywhere."""
    bare = WIRE.encode(Bulk(7, b"payload"), hashed=False)
    assert WIRE.decode(bare, is_guarded=True) == Bulk(7, b"payload")
    with pytest.raises(Damaged):
        WIRE.decode(bare)
    header, _ = WIRE.encode(Bulk(7, b"payload"))
    for is_guarded in (False, True):
        with pytest.raises(Damaged):
            WIRE.decode([header, b"pAyload"], is_guarded)
        with pytest.raises(Damaged):
            WIRE.decode([bare[0], b"longer payload"], is_guarded)
    assert WIRE.decode(bare, is_guarded=True, is_to_come=True) == Bulk(7, b"payload")
    with pytest.raises(Malformed):  # nobody would compare it
        WIRE.decode([header, b"payload"], is_guarded=True, is_to_come=True)


def test_a_payload_of_floats_is_counted_in_bytes() -> None:
    floats = memoryview(bytes(64)).cast("f")
    assert WIRE.decode(WIRE.encode(Bulk(1, floats))).payload.nbytes == 64
    with pytest.raises(Malformed):
        WIRE.encode(Bulk(1, memoryview(bytes(64))[::2]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", True),
        ("number", 1 << 63),
        ("number", 1.0),
        ("real", 1),
        ("text", b"x"),
        ("text", "x" * (TEXT_LIMIT + 1)),
        ("text", "\ud800"),
        ("octets", bytearray(b"x")),
        ("flag", 1),
        ("nothing", 0),
        ("maybe", False),
        ("kind", 3.0),
        ("kind", ["ring"]),
        ("kind", "star"),
        ("pair", (1,)),
        ("pair", [1, "x"]),
        ("names", ("a", 1)),
        ("names", ("",) * (ITEMS_LIMIT + 1)),
        ("inner", ("a", ())),
        ("perhaps", Empty()),
    ],
)
def test_a_field_of_the_wrong_type_is_not_sent(field: str, value: object) -> None:
    """Types are exact and sizes bounded before anything leaves."""
    values = {name: getattr(EVERYTHING, name) for name in Everything.__slots__}
    with pytest.raises(Malformed):
        WIRE.encode(Everything(**{**values, field: value}))


def sealed(body: object) -> bytes:
    """A header that is damaged nowhere, whatever it holds."""
    packed = msgpack.packb(body)
    return _PREFIX.pack(VERSION, xxh3_64_intdigest(packed)) + packed


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [sealed([])],
        [sealed([2, 0])],
        [sealed([3])],
        [sealed([-1])],
        [sealed([True])],
        [sealed(["x"])],
        [sealed(2)],
        [sealed({2: 2})],
        [sealed([2]), b""],
        [sealed([1, 5, 0])],
        [sealed([1, 5, 0, 0])],
        [sealed([1, 5, "0", 0]), b""],
        [sealed([1, True, 0, xxh3_64_intdigest(b"")]), b""],
        [sealed([1, 1 << 63, 0, xxh3_64_intdigest(b"")]), b""],
        [sealed([2])[:-1] + b"\xc1"],
        [bytes([VERSION + 1]) + sealed([2])[1:]],
        [sealed(msgpack.ExtType(4, b"x"))],
        [sealed([2] + [0] * (ITEMS_LIMIT + 1))],
    ],
)
def test_what_fits_no_kind_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(Malformed):
        WIRE.decode(frames)


def test_a_thousand_random_frames_are_malformed_and_nothing_else() -> None:
    """Noise, noise behind an honest checksum, and damaged messages: one exception for all."""
    wire = WireFormat[Message](KINDS)
    rng = random.Random(1)
    segment = wire.encode(Segment(1, 2, 3, 4, 5, "d" * 64, rng.randbytes(256)))
    everything = WIRE.encode(EVERYTHING)
    for trial in range(1000):
        noise = rng.randbytes(rng.randrange(200))
        frames: list[bytes] = [noise] * rng.randrange(4)
        decoder: WireFormat[Any] = wire
        if trial % 4 == 1:
            frames = [_PREFIX.pack(VERSION, xxh3_64_intdigest(noise)) + noise]
        elif trial % 4 == 2:
            frames = [bytearray(frame) for frame in segment]  # type: ignore[misc]
            frames[rng.randrange(2)][rng.randrange(20)] ^= 1 << rng.randrange(8)  # type: ignore[index]
            frames = [bytes(frame) for frame in frames]
        elif trial % 4 == 3:
            # one byte of the body changed, behind a checksum that was made to fit
            body = bytearray(everything[0][_PREFIX.size :])
            body[0] = rng.randrange(256)
            body[rng.randrange(1, 12)] = rng.randrange(0xC0, 256)
            frames = [_PREFIX.pack(VERSION, xxh3_64_intdigest(body)) + bytes(body)]
            decoder = WIRE
        try:
            message = decoder.decode(frames)
        except Malformed:
            continue
        assert trial % 4 == 3, "only a forged checksum can pass"
        assert decoder.encode(message)


@pytest.mark.parametrize("index", [0, 1])
def test_a_flipped_bit_anywhere_is_damage(index: int) -> None:
    """The header is covered too: a step or unit that changed on the way must not be believed."""
    frames = [bytes(frame) for frame in WIRE.encode(Bulk(7, b"payload"))]
    for position in range(1 if index == 0 else 0, len(frames[index])):
        damaged = bytearray(frames[index])
        damaged[position] ^= 4
        with pytest.raises(Damaged):
            WIRE.decode([*frames[:index], bytes(damaged), *frames[index + 1 :]])
    with pytest.raises(Damaged):
        WIRE.decode([frames[0], frames[1] + b"x"])


def test_a_class_that_cannot_travel_is_refused_when_registered() -> None:
    @dataclass
    class Thawed:
        number: int

    @dataclass(frozen=True)
    class Loose:
        anything: dict[str, int]

    for kind in (int, Thawed, Loose):
        with pytest.raises(TypeError):
            WireFormat([kind])
    with pytest.raises(TypeError):
        WireFormat([Empty, Empty])


# --- relays and links ------------------------------------------------------------------------


def received(link: Link | ControlAndBulk, limit_ms: int = 10_000) -> tuple[bytes, list[bytes]]:
    deadline = time.monotonic() + limit_ms / 1000
    while (message := link.receive()) is None:
        assert time.monotonic() < deadline, "no message"
        link.wait(100)
    return message[0], [bytes(frame) for frame in message[1]]


def reach(link: Link, destination: Link, name: bytes) -> None:
    """Until a message gets through: connections are made in the background."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        link.send(name, [b"hello"])
        if destination.wait(20):
            while destination.receive() is not None:
                pass
            return
    raise AssertionError("no message gets through")


def stats(link: Link) -> dict[str, int]:
    link.send(b"relay", [b"stats"])
    source, frames = received(link)
    assert source == b"relay"
    return msgpack.unpackb(frames[0])  # type: ignore[no-any-return]


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders can be too long for the name of a socket
    made = Path(tempfile.mkdtemp(prefix="relay-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def relay(folder: Path) -> Iterator[RelayProcess]:
    process = RelayProcess(folder, "a")
    yield process
    process.kill()


@pytest.fixture
def links() -> Iterator[Callable[..., Link]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[Link] = []

    def make(name: bytes, *relays: RelayProcess, limit_messages: int = 1000) -> Link:
        endpoints = [relay.endpoint for relay in relays]
        made.append(Link(name, endpoints, context, limit_messages))
        return made[-1]

    yield make
    for link in made:
        link.close()
    context.term()


@pytest.mark.parametrize("endpoint", [None, "tcp://127.0.0.1:*"])
def test_a_relay_forwards_both_ways(
    folder: Path, links: Callable[..., Link], endpoint: str | None
) -> None:
    """Small and large frames arrive whole, with the sender's name, over ipc and tcp."""
    relay = RelayProcess(folder, "a", endpoint)
    try:
        one, two = links(b"one", relay), links(b"two", relay)
        reach(one, two, b"two")
        for payload in (b"", b"x", os.urandom(3 * MEBIBYTE)):
            assert one.send(b"two", [b"header", payload])
            assert received(two) == (b"one", [b"header", payload])
            assert two.send(b"one", [payload, b"tail"])
            assert received(one) == (b"two", [payload, b"tail"])
        assert stats(one)["peers"] == 2
    finally:
        relay.kill()


def test_an_unknown_destination_is_counted(relay: RelayProcess, links: Callable[..., Link]) -> None:
    """What cannot be delivered is dropped, the number of such messages is known."""
    one, two = links(b"one", relay), links(b"two", relay)
    reach(one, two, b"two")
    before = stats(one)
    for _ in range(5):
        one.send(b"nobody", [b"x"])
    one.send(b"two", [b"x"])
    after = stats(one)
    assert after["unknown"] - before["unknown"] == 5
    assert after["messages"] - before["messages"] == 1
    assert after["dropped"] == before["dropped"]


@contextmanager
def stuck(relay: RelayProcess, sender: Link) -> Iterator[subprocess.Popen[bytes]]:
    """A peer of this name that has told `sender` that it is there, and never reads."""
    script = (
        "import sys, time; from p2p.transport.link import Link\n"
        "link = Link(b'stuck', sys.argv[1:], limit_messages=16)\n"
        "while not link.send(b'sender', [b'here']): time.sleep(0.01)\n"
        "print(flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, relay.endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            received(sender)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["does not read", "is stopped"])
def test_a_peer_that_does_not_read_harms_nobody(
    relay: RelayProcess, links: Callable[..., Link], how: str
) -> None:
    """2,000 MiB for a peer that never reads: the relay's memory stays small, others go on."""
    sender, reader = links(b"sender", relay, limit_messages=64), links(b"reader", relay)
    with stuck(relay, sender) as process:
        if how == "is stopped":
            process.send_signal(signal.SIGSTOP)
        reach(sender, reader, b"reader")
        payload = bytes(MEBIBYTE)
        highest = 0
        for index in range(2000):
            until(lambda: sender.send(b"stuck", [b"bulk", payload]))
            if index % 100 == 0:
                until(lambda: sender.send(b"reader", [b"beat"]))
                assert received(reader, 1000) == (b"sender", [b"beat"])
                highest = max(highest, relay.memory_bytes())
        counted = stats(sender)
        assert counted["dropped"] + counted["unknown"] > 1800
        assert max(highest, relay.memory_bytes()) < 250 * MEBIBYTE


def test_one_source_leaves_room_for_others(relay: RelayProcess, links: Callable[..., Link]) -> None:
    """However much it sends to a peer that does not read, what another sends is taken."""
    sender, other = links(b"sender", relay, limit_messages=64), links(b"other", relay)
    with stuck(relay, sender):
        for _ in range(400):
            until(lambda: sender.send(b"stuck", [b"bulk", bytes(MEBIBYTE)]))
        flooded = stats(sender)
        assert flooded["dropped"] > 200
        for _ in range(16):
            until(lambda: other.send(b"stuck", [b"bulk", bytes(MEBIBYTE)]))
        taken = stats(other)
        assert taken["messages"] - flooded["messages"] == 16
        assert taken["dropped"] == flooded["dropped"]


def test_a_link_outlives_its_relay(relay: RelayProcess, links: Callable[..., Link]) -> None:
    """Kill and restart the relay, three times: the same links find each other again."""
    one, two = links(b"one", relay), links(b"two", relay)
    reach(one, two, b"two")
    for _ in range(3):
        relay.kill()
        until(lambda: not one.send(b"two", [b"x"]))
        relay.start()
        reach(one, two, b"two")
        reach(two, one, b"one")


def test_two_relays_share_the_load_and_replace_each_other(
    folder: Path, relay: RelayProcess, links: Callable[..., Link]
) -> None:
    """Traffic spreads over both; with one dead, every message still arrives."""
    other = RelayProcess(folder, "b")
    try:
        one, two = links(b"one", relay, other), links(b"two", relay, other)
        alone = [links(b"1", relay), links(b"2", other)]
        for link, name in zip(alone, (b"1", b"2"), strict=True):
            reach(link, link, name)
            reach(link, one, b"one")
            reach(link, two, b"two")
        before = [stats(link)["messages"] for link in alone]
        for index in range(100):
            assert one.send(b"two", [b"%d" % index])
        assert len({received(two)[1][0] for _ in range(100)}) == 100
        after = [stats(link)["messages"] for link in alone]
        assert [late - early for early, late in zip(before, after, strict=True)] == [50, 50]

        relay.kill()
        # until the death is noticed a message may be lost on the way to it, and be asked for again
        until(lambda: len([s for s in one.sockets() if s.poll(0, zmq.POLLOUT)]) == 1)
        for index in range(100):
            assert one.send(b"two", [b"%d" % index])
        assert len({received(two)[1][0] for _ in range(100)}) == 100
    finally:
        other.kill()


def test_a_name_that_returns_takes_over(relay: RelayProcess, links: Callable[..., Link]) -> None:
    """A second connection under one name gets the messages, at once."""
    one, old = links(b"one", relay), links(b"two", relay)
    reach(one, old, b"two")
    new = links(b"two", relay)
    reach(one, new, b"two")


def test_control_overtakes_bulk(relay: RelayProcess) -> None:
    """A beat behind 48 MiB of segments arrives before them, and its sender has one name."""
    one, two = (ControlAndBulk(name, [relay.endpoint]) for name in (b"one", b"two"))
    try:
        reach(one.control, two.control, b"two/c")
        reach(one.bulk, two.bulk, b"two/b")
        for index in range(48):
            assert one.send_bulk(b"two", [b"%d" % index, bytes(MEBIBYTE)])
        assert one.send_control(b"two", [b"beat"])
        until(lambda: two.control.wait(10))
        assert received(two) == (b"one", [b"beat"])
        for index in range(48):
            source, (header, payload) = received(two)
            assert (source, header, len(payload)) == (b"one", b"%d" % index, MEBIBYTE)
    finally:
        one.close()
        two.close()


def test_a_relay_leaves_quietly(relay: RelayProcess) -> None:
    """SIGTERM ends it with 0, without a word and without its socket's file."""
    file = Path(relay.endpoint.removeprefix("ipc://"))
    assert file.exists()
    relay.process.terminate()
    output, _ = relay.process.communicate(timeout=10)
    assert relay.process.returncode == 0
    assert output == b""
    assert not file.exists()


def test_a_relay_refuses_a_folder_that_others_enter(folder: Path) -> None:
    """One line that says what to do, and the exit code of a wrong input."""
    folder.chmod(0o755)
    answer = subprocess.run(
        [sys.executable, "-m", "p2p.transport.relay", "--bind", f"ipc://{folder}/a"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert answer.returncode == 2
    assert answer.stderr == f"relay: others may enter {folder}: make it yours, with mode 700\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.0.2.1", "[::]", "example.org", ""])
def test_a_relay_listens_to_this_machine_only(host: str) -> None:
    """What goes through it is not encrypted, so no other address is bound, and it says so."""
    answer = subprocess.run(
        [sys.executable, "-m", "p2p.transport.relay", "--bind", f"tcp://{host}:7799"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert answer.returncode == 2
    assert "others could reach it" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True)),
        *(("[::1]", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False)),
        *(("localhost.example.org", False), ("", False), ("*", False), ("[127.0.0.1", True)),
    ],
)
def test_which_hosts_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        *(("ipc:///run/relay.sock", True), ("tcp://127.0.0.1:*", True), ("tcp://[::1]:7700", True)),
        *(("tcp://10.0.0.1:7700", False), ("tcp://*:7700", False), ("tcp://relay:7700", False)),
    ],
)
def test_which_endpoints_stay_within_the_host(endpoint: str, expected: bool) -> None:
    assert is_within_host(endpoint) == expected
