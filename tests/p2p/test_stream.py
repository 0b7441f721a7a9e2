"""Connections of our own over real sockets: for whoever has a ticket, whole or not at all."""

from __future__ import annotations

import os
import random
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from p2p.transport.entrance import STRANGERS_LIMIT, STRANGERS_S, Entrance
from p2p.transport.framing import (
    HEADER_LIMIT_BYTES,
    LARGEST_BYTES,
    PIECE_BYTES,
    RECORD_BYTES,
    Broken,
    Target,
)
from p2p.transport.incoming import AHEAD_BYTES, Reading
from p2p.transport.sealing import TAG_BYTES, TICKET_BYTES, Invitation
from p2p.transport.stream import Address, Connection
from p2p.transport.watch import Watch
from p2p.transport.wire import Frame, Malformed
from tests.relay_process import until as wait_until

Message = list[Frame]
Came = tuple[bytes, list[bytes]]
PREFIX = struct.Struct("<BHII")


def begin(header: bytes, size: int | None) -> tuple[Message, Target]:
    if header == b"malformed":
        raise Malformed("a header that is none")
    if header == b"piece by piece":
        taken = bytearray()

        def take(start: int, piece: memoryview) -> None:
            assert start == len(taken)
            taken.extend(piece)
            piece[:] = bytes(len(piece))

        return [header, taken], take
    payload = memoryview(bytearray(size or 0))
    return [header] if size is None else [header, payload], payload


class Place:
    """An entrance and those who dial it, in one thread."""

    def __init__(self, address: Address, seals: bool, ahead: bool = False) -> None:
        self.address = address
        self.watch = Watch()
        self.entrance: Entrance[Message] = Entrance(
            [address], self.watch, seals, begin, Reading(ahead, takes_parts=True)
        )
        self.came: list[Came] = []
        self.refused = 0
        self._dialled: list[Connection[Message]] = []

    def dial(self, invitation: Invitation, port: int = 0) -> Connection[Message]:
        address = self.address
        if isinstance(address, tuple):
            address = address[0], port or invitation.port
        self._dialled.append(Connection.dialled(address, invitation, self.watch, begin, Reading()))
        return self._dialled[-1]

    def joined(self, name: bytes, port: int = 0) -> Connection[Message]:
        made = self.dial(self.entrance.invite(name), port)
        self.until(lambda: name in self.entrance.named)
        return made

    def stranger(self) -> socket.socket:
        """A connection that is not ours; somebody is expected."""
        invitation = self.entrance.invite(b"somebody")
        if isinstance(self.address, Path):
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(str(self.address))
            return raw
        return socket.create_connection((self.address[0], invitation.port))

    def turn(self) -> None:
        """Takes what there is into `came`."""
        self.watch.poll(20)
        self.entrance.accept()
        for end in (*self._dialled, *self.entrance.connections.values()):
            if end.fileno() >= 0:
                with suppress(Broken):
                    end.flush()
        self.refused += self.entrance.taken_refused()
        for connection in [*self.entrance.connections.values()]:
            while (message := self.entrance.receive(connection)) is not None:
                self.came.append((connection.name, [bytes(frame) for frame in message]))

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.turn()

    def received(self) -> Came:
        self.until(lambda: self.came)
        return self.came.pop(0)

    def close(self) -> None:
        for dialled in self._dialled:
            dialled.close()
        self.entrance.close()


@pytest.fixture(params=["127.0.0.1", "::1", "unix"])
def address(request: pytest.FixtureRequest) -> Iterator[Address]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be too long for a socket
        yield Path(folder) / "socket" if request.param == "unix" else (request.param, 0)


@pytest.fixture(
    params=[(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "sealed", "plain-ahead", "sealed-ahead"],
)
def place(address: Address, request: pytest.FixtureRequest) -> Iterator[Place]:
    made = Place(address, *request.param)
    yield made
    made.close()


@pytest.fixture
def sealed() -> Iterator[Place]:
    made = Place(("127.0.0.1", 0), seals=True)
    yield made
    made.close()


SIZES = [
    0,
    1,
    *range(AHEAD_BYTES - 20, AHEAD_BYTES + 5),
    RECORD_BYTES - 1,
    RECORD_BYTES,
    PIECE_BYTES,
    PIECE_BYTES + 1,
    5 << 20,
]


def test_messages_arrive_whole_both_ways(place: Place) -> None:
    """Of every size, with a payload or without, under the name of whoever was invited."""
    connection = place.joined(b"a")
    for size in SIZES:
        payload = os.urandom(size)
        connection.send([b"header", payload])
        assert place.received() == (b"a", [b"header", payload])
        place.entrance.named[b"a"].send([b"answer", payload])
        answers: list[Message | None] = []

        def is_answered(answers: list[Message | None] = answers) -> bool:
            answers.append(connection.receive())
            return answers[-1] is not None

        place.until(is_answered)
        assert [bytes(frame) for frame in answers[-1] or []] == [b"answer", payload]
    connection.send([b"alone" * 1000])
    assert place.received() == (b"a", [b"alone" * 1000])


def test_a_payload_can_be_taken_while_it_comes(place: Place) -> None:
    connection = place.joined(b"a")
    for size in SIZES:
        payload = os.urandom(size)
        connection.send([b"piece by piece", payload])
        connection.send([b"header", payload])
        assert place.received() == (b"a", [b"piece by piece", payload])
        assert place.received() == (b"a", [b"header", payload])


def test_parts_of_messages_can_be_mixed(place: Place) -> None:
    """Of any length; and a message can end before it is whole."""
    connection = place.joined(b"a")
    draw = random.Random(1)
    payloads = [draw.randbytes(size) for size in (0, 1, 1000, RECORD_BYTES + 1, 3 * PIECE_BYTES)]
    connection.send_beginning(2, b"piece by piece", 10)
    connection.send_part(2, b"never")
    for channel, payload in enumerate(payloads):
        connection.send_beginning(
            channel, b"piece by piece" if channel % 2 else b"header", len(payload)
        )
    sent = [0] * len(payloads)
    while open_channels := [each for each in range(5) if sent[each] < len(payloads[each])]:
        channel = draw.choice(open_channels)
        part = payloads[channel][sent[channel] :][: draw.choice([1, 63, 4097, RECORD_BYTES + 5])]
        connection.send_part(channel, part)
        sent[channel] += len(part)
        place.turn()
    connection.send([b"header", b"whole"])
    place.until(lambda: len(place.came) == 6)
    assert {bytes(each[1]) for _, each in place.came} == {*payloads, b"whole"}
    connection.send_beginning(4, b"header", 10)
    connection.send_part(4, b"not ten")
    connection.send_end(4)
    connection.send([b"header", b"and it goes on"])
    place.until(lambda: len(place.came) == 7)


@pytest.mark.parametrize("parts", [[b"more than ten"], [b"0123456789", b""]])
def test_parts_that_do_not_belong_break_the_connection(place: Place, parts: list[bytes]) -> None:
    connection = place.joined(b"a")
    connection.send_beginning(4, b"header", 10)
    for part in parts:
        connection.send_part(4, part)
    place.until(lambda: not place.entrance.connections)


def test_what_moves_is_told_from_what_stands_still(place: Place) -> None:
    near = place.joined(b"peer")
    far = place.entrance.named[b"peer"]
    assert not near.is_leaving and not far.arriving
    near.send([b"header", bytes(16 << 20)])
    assert near.is_leaving, "it was begun a moment ago"
    place.until(lambda: far.arriving)

    ticks = count()

    def stands_still() -> bool:
        now = float(next(ticks))
        near.tick(now)
        far.tick(now)
        return not near.is_leaving and not far.arriving

    wait_until(stands_still, 5)  # while nobody reads
    place.turn()
    place.until(lambda: not stands_still() and near.is_leaving and far.arriving)
    place.received()
    assert not far.arriving
    wait_until(lambda: not near.is_leaving, 5)  # what was acknowledged


def test_many_at_once_are_kept_apart(place: Place) -> None:
    """Messages of three that write at the same time."""
    connections = {name: place.joined(name) for name in (b"a", b"b", b"c")}
    sent = {name: [os.urandom(700_000) for _ in range(10)] for name in connections}
    for index in range(10):
        for name, connection in connections.items():
            connection.send([b"%d" % index, sent[name][index]])
    place.until(lambda: len(place.came) == 30)
    for name in connections:
        assert [message for source, message in place.came if source == name] == [
            [b"%d" % index, sent[name][index]] for index in range(10)
        ]


def test_without_a_ticket_that_counts_nobody_gets_in(place: Place) -> None:
    """None, a wrong one, one that was used, one that was withdrawn; all are counted."""
    used = place.entrance.invite(b"a")
    place.dial(used)
    place.until(lambda: b"a" in place.entrance.named)
    withdrawn = place.entrance.invite(b"b")
    assert place.entrance.invite(b"b") == withdrawn  # it may be late, and is asked for again
    place.entrance.keep([b"a"])
    wrong = Invitation(withdrawn.port, os.urandom(TICKET_BYTES), withdrawn.key)
    for index, invitation in enumerate((used, withdrawn, wrong)):
        place.entrance.invite(b"c")  # somebody is expected
        place.dial(invitation).send([b"header", b"payload"])
        place.until(lambda index=index: place.refused > index)
    assert not place.came
    silent = place.stranger()
    place.until(lambda: len(place.entrance.connections) == 2)
    place.entrance.tick(10.0)
    place.entrance.tick(10.0 + STRANGERS_S / 2)
    assert len(place.entrance.connections) == 2
    place.entrance.tick(10.1 + STRANGERS_S)
    place.turn()
    assert place.refused == 4 and [*place.entrance.named] == [b"a"]
    silent.close()


def test_strangers_are_bounded(place: Place) -> None:
    """However many connect and say nothing, few are held, and who has a ticket gets in."""
    strangers = [place.stranger() for _ in range(3)]
    for _ in range(2 * STRANGERS_LIMIT):
        strangers.append(place.stranger())
        place.turn()
    assert len(place.entrance.connections) == STRANGERS_LIMIT
    place.joined(b"a").send([b"header", b"payload"])
    assert place.received() == (b"a", [b"header", b"payload"])
    for stranger in strangers:
        stranger.close()


def test_while_nobody_is_expected_nobody_is_let_in(place: Place) -> None:
    place.joined(b"a")
    stranger = place.stranger()
    place.until(lambda: len(place.entrance.connections) == 2)
    place.entrance.keep([b"a"])
    another = socket.socket(stranger.family)
    another.connect(stranger.getpeername())
    place.turn()
    assert len(place.entrance.connections) == 2
    stranger.close()
    another.close()


def test_a_name_that_returns_takes_over(place: Place) -> None:
    """And whoever is not kept is gone."""
    old = place.joined(b"a")
    new = place.dial(place.entrance.invite(b"a"))
    place.until(lambda: new.is_open and len(place.entrance.connections) == 1)
    new.send([b"new", b""])
    assert place.received() == (b"a", [b"new", b""])
    with pytest.raises(Broken):
        while True:
            place.watch.poll(20)
            old.receive()
    place.entrance.keep([b"b"])
    assert not place.entrance.connections
    with pytest.raises(Broken):
        while True:
            place.watch.poll(20)
            new.receive()


BROKEN = {
    "a long header": PREFIX.pack(2, 0, HEADER_LIMIT_BYTES + 1, 0),
    "no header": PREFIX.pack(2, 0, 0, 1) + b"x",
    "a long payload": PREFIX.pack(2, 0, 1, LARGEST_BYTES + 1) + b"x",
    "noise": random.Random(1).randbytes(10_000),
    "an end in the middle": PREFIX.pack(2, 0, 1, 1000) + b"xx",
}
MALFORMED = {
    "no frames": PREFIX.pack(0, 0, 1, 0) + b"x",
    "a payload too many": PREFIX.pack(1, 0, 1, 1) + b"xx",
    "a malformed header": PREFIX.pack(2, 0, 9, 5) + b"malformed" + b"12345",
}


def test_what_was_ahead_of_a_closed_connection_is_lost(place: Place) -> None:
    """As when a newer one of the same name is admitted before the older one is asked again."""
    joined = place.joined(b"a")
    for number in range(3):
        joined.send([bytes([number]) * 100])
    [older] = place.entrance.connections.values()
    end = time.monotonic() + 10
    while place.entrance.receive(older) is None:
        assert time.monotonic() < end
        place.watch.poll(20)
        joined.flush()
    place.entrance.end(older)
    assert not older.has_come and older.receive() is None


def impostor(place: Place) -> socket.socket:
    """Has a ticket, and says what it likes."""
    invitation = place.entrance.invite(b"b")
    raw = socket.create_connection(("127.0.0.1", invitation.port))
    raw.sendall(invitation.ticket)
    place.until(lambda: b"b" in place.entrance.named)
    return raw


@pytest.fixture
def plain() -> Iterator[Place]:
    made = Place(("127.0.0.1", 0), seals=False)
    yield made
    made.close()


def test_all_that_was_sent_before_the_end_is_received(place: Place) -> None:
    """However many messages came at once."""
    connection = place.joined(b"a")
    for number in range(200):
        connection.send([b"%d" % number, bytes(number)])
    assert connection.is_idle
    connection.close()
    for number in range(200):
        assert place.received() == (b"a", [b"%d" % number, bytes(number)])
    place.until(lambda: not place.entrance.connections)


@pytest.mark.parametrize("garbage", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_ends_a_connection_and_no_other(garbage: bytes, plain: Place) -> None:
    honest, raw = plain.joined(b"a"), impostor(plain)
    raw.sendall(garbage)
    raw.close()
    plain.until(lambda: [*plain.entrance.named] == [b"a"])
    assert len(plain.entrance.connections) == 1
    honest.send([b"header", b"payload"])
    assert plain.received() == (b"a", [b"header", b"payload"])


@pytest.mark.parametrize("garbage", MALFORMED.values(), ids=MALFORMED)
def test_what_follows_a_malformed_message_is_read(garbage: bytes, plain: Place) -> None:
    """It is an error of its own, whoever sent it, and its payload is nowhere."""
    raw = impostor(plain)
    for number in range(3):
        raw.sendall(garbage)
        with pytest.raises(Malformed):
            plain.until(lambda: plain.came)
        raw.sendall(PREFIX.pack(2, 0, 1, 3) + b"%d" % number + b"yes")
        assert plain.received() == (b"b", [b"%d" % number, b"yes"])
    raw.close()


class Between:
    """Someone on the way, who passes on what `change` makes of each record of a connection."""

    def __init__(self, port: int, change: Callable[[int, bytes], list[bytes]]) -> None:
        self._change = change
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.seen = b""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        inward, _ = self._listener.accept()
        with inward, socket.create_connection(("127.0.0.1", self._target)) as outward:
            sizes = [TICKET_BYTES, *[PREFIX.size + TAG_BYTES, 6 + TAG_BYTES, 1000 + TAG_BYTES] * 3]
            with suppress(OSError):
                for index, size in enumerate(sizes):
                    record = inward.recv(size, socket.MSG_WAITALL)
                    self.seen += record
                    for passed in self._change(index, record):
                        outward.sendall(passed)
                inward.recv(1)

    def close(self) -> None:
        self._listener.close()


def flipped(index: int, record: bytes) -> list[bytes]:
    return [record[:-20] + bytes([record[-20] ^ 1]) + record[-19:] if index == 6 else record]


def repeated(index: int, record: bytes) -> list[bytes]:
    return [record, record] if index == 6 else [record]


def left_out(index: int, record: bytes) -> list[bytes]:
    return [] if index == 6 else [record]


class Swapped:
    """Two payloads of the same length change their places."""

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, index: int, record: bytes) -> list[bytes]:
        if index == 3:
            self._held = record
            return [record]
        return [self._held] if index == 6 else [record]


@pytest.mark.parametrize(
    "change",
    [flipped, repeated, left_out, Swapped()],
    ids=["flipped", "repeated", "left out", "swapped"],
)
@pytest.mark.parametrize("is_taken", [False, True], ids=["written", "taken"])
def test_whoever_is_between_can_only_break_it(
    is_taken: bool, change: Callable[[int, bytes], list[bytes]], sealed: Place
) -> None:
    """The first of three messages arrives; what was changed does not, nor where it would lie."""
    memory = bytearray(b"\xaa" * 1000)

    def take(start: int, piece: memoryview) -> None:
        memory[start : start + len(piece)] = piece

    def into_memory(header: bytes, size: int | None) -> tuple[Message, Target]:
        return [header, memoryview(memory)], take if is_taken else memoryview(memory)

    sealed.entrance.begin = into_memory
    invitation = sealed.entrance.invite(b"a")
    between = Between(invitation.port, change)
    connection = sealed.dial(invitation, between.port)
    payloads = [bytes([index]) * 1000 for index in (1, 2, 3)]
    for index, payload in enumerate(payloads):
        with suppress(Broken):
            connection.send([b"number" if index else b"first!", payload])
    sealed.until(lambda: sealed.came and not sealed.entrance.connections)
    came = [message[0] for _, message in sealed.came]
    assert came in ([b"first!"], [b"first!", b"number"])
    assert bytes(memory) in payloads[: len(came)]
    assert not any(payload[:16] in between.seen for payload in payloads)
    assert b"first!" not in between.seen and invitation.key not in between.seen
    between.close()


def test_an_invitation_survives_the_way_and_others_are_refused() -> None:
    for key in (b"", os.urandom(32)):
        invitation = Invitation(7700, os.urandom(TICKET_BYTES), key)
        assert Invitation.from_bytes(invitation.to_bytes()) == invitation
        assert Invitation.from_bytes(memoryview(invitation.to_bytes())) == invitation
    for wrong in (b"", os.urandom(17), os.urandom(51)):
        with pytest.raises(ValueError, match="invitation"):
            Invitation.from_bytes(wrong)


def test_nobody_there_is_an_end(address: Address) -> None:
    place = Place(address, seals=False)
    invitation = place.entrance.invite(b"a")
    place.close()
    with pytest.raises((OSError, Broken)):
        connection = place.dial(invitation)
        while True:
            place.watch.poll(20)
            connection.flush()
