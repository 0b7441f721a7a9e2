"""A run over TCP among strangers: they get nowhere, and its secrets can nowhere be read."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import pytest
import zmq
from xxhash import xxh3_64_intdigest

from chaos.live import Kill, LiveRun, Result, Workload, play
from fault.records import Timing
from fault.registry import Registry
from launcher.database_server import server_binary
from p2p.messages import KINDS, Ask, Beat, Message, NotYet, Segment
from p2p.transport.keys import PEER_FILE, RELAY_FILE, PeerKeys, dial, new_keys
from p2p.transport.link import Link
from p2p.transport.wire import VERSION, WireFormat
from tests.ports import free_port

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
WORK = Workload(JOB, 400, "ring")
WIRE: WireFormat[Message] = WireFormat(KINDS)
MALFORMED = 10_000
Reference = Callable[[Workload], Result]
Socket = zmq.Socket[bytes]


def garbage(draw: random.Random) -> list[bytes]:
    """Frames that are no message: of any bytes, or of the right form with a wrong body."""
    if draw.random() < 0.5:
        sizes = draw.choices((0, 1, 9, 100, 5000), k=draw.randint(1, 4))
        return [draw.randbytes(size) for size in sizes]
    kind = draw.choice((0, 3, 5, 9, 200, -1, "x", None))
    body = [draw.choice((-1, 2**63, "x" * 300, None, [], [1] * 1000, 1.5)) for _ in range(6)]
    packed = msgpack.packb([kind, *body])
    header = bytes([VERSION]) + xxh3_64_intdigest(packed).to_bytes(8, "little") + packed
    return [header, draw.randbytes(1000)]


def processes() -> dict[int, bytes]:
    """The arguments of everything that runs on this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
    return found


@dataclass
class Attack:
    """Strangers without the key, and one who has it and sends nothing but rubbish."""

    step: int
    secrets: list[str] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)
    """Arguments of processes, and what the commands say."""
    refused: int = 0

    def strike(self, run: LiveRun) -> None:
        self.keys = keys = PeerKeys.read(run.folder.keys / PEER_FILE)
        ready = json.loads(run.folder.supervisor.read_text())
        registry = Registry(ready["registry"], run.folder.id, Timing())
        view = registry.read().view
        assert view is not None and view.number > 1  # older views can be spoken of
        context: zmq.Context[Socket] = zmq.Context()
        link = Link(b"mallory/c", ready["relays"], context, keys=keys)
        strangers = [
            self._stranger(context, ready["relays"][0], f"{peer}/{way}".encode(), key, keys)
            for peer in view.members
            for way in "cb"
            for key in (None, new_keys()[1])
        ]
        draw = random.Random(1)
        names = [f"{peer}/{way}".encode() for peer in view.members for way in "cb"]
        for number in range(MALFORMED):
            while not link.send(draw.choice(names), garbage(draw)):
                time.sleep(0.001)  # no relay has room
            if number % 100 == 0:
                for message in self._stale(view.number - 1):
                    link.send(draw.choice(names), WIRE.encode(message))
        self.seen += processes().values()
        status = said("status", run, "--json")
        self.seen.append(status)
        self.refused = sum(relay["refused"] for relay in json.loads(status)["relays"])
        for each in (link, registry):
            each.close()
        assert not any(stranger.poll(0) for stranger in strangers)
        context.destroy(linger=0)

    def _stranger(
        self,
        context: zmq.Context[Socket],
        endpoint: str,
        name: bytes,
        other: PeerKeys | None,
        keys: PeerKeys,
    ) -> Socket:
        """Under a member's name."""
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, name)
        if other is not None:
            dial(dealer, other, keys.relay)
        dealer.connect(endpoint)
        return dealer

    def _stale(self, view: int) -> list[Message]:
        """As if recorded in an older view."""
        return [
            Beat(view, 3, "x" * 16, 5, -1),
            NotYet(view, 10_000, True, 7),
            Ask(view, 2, (0, 0, 0)),
            Segment(view, self.step, 0, 0, 1, "x" * 16, bytes(4096)),
        ]


def said(command: str, run: LiveRun, *options: str) -> bytes:
    home = run.folder.path.parents[1]
    line = ["p2p-launch", command, run.folder.id, "--home", str(home), *options]
    return subprocess.run(line, check=True, capture_output=True).stdout


@pytest.fixture
def registry_url(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A server with a password: its URL, with the password's file, and the password."""
    password, port = "correct-horse-battery", free_port()
    file = tmp_path / "password"
    file.write_text(password)
    command = [server_binary(), "--port", str(port), "--save", "", "--dir", str(tmp_path), "-"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert server.stdin is not None
    server.stdin.write(f"requirepass {password}\n".encode())
    server.stdin.close()
    yield f"redis://127.0.0.1:{port}?password_file={file}", password
    server.kill()
    server.wait()


@pytest.mark.timeout(400)
def test_strangers_change_nothing_and_learn_nothing(
    home: Path,
    reference: Reference,
    registry_url: tuple[str, str],
    relay_address: str,
    tmp_path: Path,
) -> None:
    """No key, another run's, members' names; 10,000 malformed messages, some of other states."""
    url, password = registry_url
    attack = Attack(120)
    options = ["--relay-listen", relay_address, "--relays", "2"]
    options += ["--links", "direct", "--registry", url, "--keys", str(tmp_path / "keys")]
    command = ["p2p-launch", "keys", str(tmp_path / "keys")]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert made == [str(tmp_path / "keys" / name) for name in (RELAY_FILE, PEER_FILE)]
    assert subprocess.run(command, capture_output=True).returncode == 2  # none is written over
    result = play(JOB, home, "security", [*WORK.options, *options], (Kill(40, (1,)), attack))
    assert result.weights == reference(WORK).weights
    assert result.summary["deaths"] == 1  # the one that was meant
    refused = sum(relay["refused"] for relay in result.summary["relays"])
    assert 0 < attack.refused <= refused
    assert result.summary["traffic"]["malformed"] > MALFORMED / 2
    assert attack.keys == PeerKeys.read(tmp_path / "keys" / PEER_FILE)
    folder = home / "runs" / "security"
    relay = json.loads((folder / "keys" / "relay.key").read_text())
    secrets = [password, attack.keys.secret, relay["secret"]]
    public = [*attack.seen, json.dumps(result.summary).encode()]
    public += [
        file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.parent != folder / "keys"
    ]
    assert any(b"p2p.transport.relay" in arguments for arguments in attack.seen)
    for secret in secrets:
        assert not [each[:200] for each in public if secret.encode() in each]
