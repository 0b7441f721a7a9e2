"""Over TCP a relay and a peer's own endpoint let in who has the run's key, and nobody else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from fault.errors import InputError
from p2p.messages import KINDS, Beat, Message
from p2p.traffic import Traffic
from p2p.transport.direct import DirectLinks
from p2p.transport.keys import (
    PEER_FILE,
    RELAY_FILE,
    PeerKeys,
    RelayKeys,
    dial,
    new_keys,
    read_keys,
    write_keys,
)
from p2p.transport.link import Link
from p2p.transport.relay import RELAY, STATS
from p2p.transport.shared import Pool
from p2p.transport.watch import Watch
from p2p.transport.wire import WireFormat

WIRE: WireFormat[Message] = WireFormat(KINDS)
Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    made: zmq.Context[Socket] = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_keys(new_keys(), tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def peer(folder: Path) -> PeerKeys:
    return PeerKeys.read(folder / PEER_FILE)


@pytest.fixture(params=["127.0.0.1", "[::1]"])
def endpoint(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A relay's, in a process of its own."""
    ready = folder / "ready"
    command = [sys.executable, "-m", "p2p.transport.relay", "--bind", f"tcp://{request.param}:*"]
    command += ["--keys", str(folder / RELAY_FILE), "--ready-file", str(ready)]
    process = subprocess.Popen(command)
    until = time.monotonic() + 20
    while not ready.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    yield ready.read_text().strip()
    process.kill()
    process.wait()


def received(link: Link, seconds: float = 10.0) -> tuple[bytes, list[bytes]]:
    until = time.monotonic() + seconds
    while (message := link.receive()) is None:
        assert time.monotonic() < until, "no message"
        link.wait(50)
    return message[0], [bytes(frame) for frame in message[1]]


def stats(link: Link) -> dict[str, int]:
    while not link.send(RELAY, [STATS]):
        link.wait(20)
    found: dict[str, int] = msgpack.unpackb(received(link)[1][0])
    return found


def no_key(dealer: Socket, peer: PeerKeys) -> None:
    """Plain ZeroMQ."""


def wrong_key(dealer: Socket, peer: PeerKeys) -> None:
    """Knows the relay's public key, which is no secret."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    dial(dealer, PeerKeys(public, secret, peer.relay), peer.relay)


def another_runs(dealer: Socket, peer: PeerKeys) -> None:
    dial(dealer, new_keys()[1], peer.relay)


def only_the_public_one(dealer: Socket, peer: PeerKeys) -> None:
    """The peers' public key with another secret one."""
    dial(dealer, PeerKeys(peer.public, new_keys()[1].secret, peer.relay), peer.relay)


def mistaken(dealer: Socket, peer: PeerKeys) -> None:
    """A peer of the run that takes this for another relay."""
    dial(dealer, peer, new_keys()[0].public)


STRANGERS = (no_key, wrong_key, another_runs, only_the_public_one, mistaken)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_gets_nowhere(
    stranger: Callable[[Socket, PeerKeys], None],
    endpoint: str,
    peer: PeerKeys,
    context: zmq.Context[Socket],
) -> None:
    """Not even under the name of a peer; it is counted, and the peers go on speaking."""
    one, two = (Link(name, [endpoint], context, keys=peer) for name in (b"one", b"two"))
    assert stats(one)["refused"] == 0
    stats(two)
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, b"two")
    dealer.setsockopt(zmq.RECONNECT_IVL, 20)
    dealer.ipv6 = True
    stranger(dealer, peer)
    dealer.connect(endpoint)
    dealer.send_multipart([b"one", b"forged"])
    until = time.monotonic() + 10
    while stats(one)["refused"] == 0:
        assert time.monotonic() < until, "it was not counted"
    for number in range(100):
        one.send(b"two", [b"%d" % number])
        assert received(two) == (b"one", [b"%d" % number])
        two.send(b"one", [b"answer"])
        assert received(one) == (b"two", [b"answer"])
    assert not dealer.poll(50)
    dealer.close(linger=0)
    one.close()
    two.close()


def test_bytes_that_are_no_zeromq_harm_nobody(
    endpoint: str, peer: PeerKeys, context: zmq.Context[Socket]
) -> None:
    one, two = (Link(name, [endpoint], context, keys=peer) for name in (b"one", b"two"))
    stats(two)
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00"
    for sent in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), greeting + b"CURVE" + bytes(100)):
        with socket.create_connection((host.strip("[]"), int(port))) as raw:
            raw.sendall(sent)
    stats(one)
    one.send(b"two", [b"as ever"])
    assert received(two) == (b"one", [b"as ever"])
    one.close()
    two.close()


class End:
    """One peer's links over TCP."""

    def __init__(self, name: str, keys: PeerKeys | None) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.watch = Watch()
        self.traffic = Traffic()
        binds = ["tcp://127.0.0.1:*"]
        self.links = DirectLinks(
            name, binds, self.context, self.watch, WIRE, Pool(), self.traffic, keys
        )

    def look(self) -> list[tuple[str, Message]]:
        self.watch.poll(20)
        self.links.flush()
        self.links.tick(time.monotonic())
        found = []
        while (message := self.links.receive()) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        self.links.close()
        self.context.term()  # which waits for every socket


def test_direct_links_are_for_the_runs_peers_only(peer: PeerKeys) -> None:
    """One of another run, or with no key, is not welcomed although it knows the number."""
    a, b = End("a", peer), End("b", peer)
    strangers = [End("c", new_keys()[1]), End("d", None)]
    beat = Beat(1, 2, "", 3, 4)
    try:
        hello = b.links.hello("a", 0.0)
        assert hello is not None
        until = time.monotonic() + 10
        while not a.links.send("b", beat):
            assert time.monotonic() < until
            a.links.on_hello("b", hello, time.monotonic())
            a.look(), b.look()
        while b.look() != [("a", beat)]:
            assert time.monotonic() < until
        assert b.traffic.refused_keys == 0
        for name, stranger in zip("cd", strangers, strict=True):
            hello = b.links.hello(name, 0.0)
            assert hello is not None
            for _ in range(20):
                stranger.links.on_hello("b", hello, time.monotonic())
                assert stranger.look() == [] and b.look() == []
            assert not stranger.links.send("b", beat)
        knows_more = b.context.socket(zmq.DEALER)  # the run's public key, which is no secret
        dial(knows_more, new_keys()[1], peer.public)
        knows_more.connect(b.links.endpoints[0])
        while b.traffic.refused_keys == 0:
            assert time.monotonic() < until + 10, "it was not counted"
            b.look()
        knows_more.close(linger=0)
        assert a.links.send("b", beat)
        while b.look() != [("a", beat)]:
            assert time.monotonic() < until + 20
    finally:
        for end in (a, b, *strangers):
            end.close()


# --- the files --------------------------------------------------------------------------------


def test_only_their_user_can_read_the_files(folder: Path) -> None:
    assert [(folder / name).stat().st_mode & 0o777 for name in (RELAY_FILE, PEER_FILE)] == [
        0o600
    ] * 2
    relay, peer = RelayKeys.read(folder / RELAY_FILE), PeerKeys.read(folder / PEER_FILE)
    assert relay.peers == peer.public and peer.relay == relay.public
    assert relay.secret not in repr(relay) and peer.secret not in repr(peer)


def test_keys_are_not_written_over(folder: Path) -> None:
    """Nor put where others could exchange them."""
    before = (folder / RELAY_FILE).read_bytes()
    with pytest.raises(InputError, match="File exists"):
        write_keys(new_keys(), folder)
    assert (folder / RELAY_FILE).read_bytes() == before
    folder.parent.chmod(0o755)
    with pytest.raises(InputError, match="others can enter"):
        write_keys(new_keys(), folder.parent)


def spoilt(text: str) -> list[str]:
    values = json.loads(text)
    return [
        "",
        "no json",
        "[]",
        json.dumps({**values, "more": "x" * 40}),
        json.dumps({**values, "public": 7}),
        json.dumps({**values, "secret": values["secret"][1:]}),
        json.dumps({**values, "relay": " " * 40}),
        json.dumps({**values, "secret": new_keys()[1].secret}),
    ]


def test_a_file_that_is_no_key_file_is_an_error(folder: Path) -> None:
    """One that others can read, too. No message repeats a secret."""
    file = folder / PEER_FILE
    good = file.read_text()
    for text in spoilt(good):
        file.write_text(text)
        with pytest.raises(InputError, match=PEER_FILE) as raised:
            PeerKeys.read(file)
        assert json.loads(good)["secret"][1:] not in str(raised.value)
    file.write_text(good)
    with pytest.raises(InputError, match=r"as 'p2p-launch keys' writes"):
        RelayKeys.read(file)
    file.chmod(0o640)
    with pytest.raises(InputError, match="others can read"):
        PeerKeys.read(file)
    with pytest.raises(InputError, match="No such file"):
        PeerKeys.read(folder / "missing")


def test_keys_of_two_runs_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    write_keys(read_keys(folder), tmp_path / "copy")
    assert read_keys(tmp_path / "copy") == read_keys(folder)
    (folder / PEER_FILE).unlink()
    new_keys()[1].write(folder / PEER_FILE)
    with pytest.raises(InputError, match="do not belong together"):
        read_keys(folder)
