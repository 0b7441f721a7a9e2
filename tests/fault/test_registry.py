"""The registry's client and its server, against a real one: what is acknowledged stays."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from fault.errors import InputError, RegistryUnavailable
from fault.records import Contact, Doing, Outcome, Proposal, Timing, View, peer_name
from fault.registry import RECORDS, Event, Registry
from launcher.database_server import server_binary, short_folder
from launcher.registry_server import RegistryServer

TIMING = Timing()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    server = RegistryServer(tmp_path_factory.mktemp("run"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RegistryServer]:
    """A server that a test may kill."""
    server = RegistryServer(tmp_path / "run")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W", "-", request.node.name)


def claimed(registry: Registry, slot: int) -> str:
    peer = peer_name(slot, 1, "nonce")
    assert registry.grant(slot, 1, f"token-{slot}", "launcher")
    assert registry.claim(slot, 1, f"token-{slot}", peer)
    return peer


def first_view(*peers: str, identity: str = "first", kind: str = "first") -> Proposal:
    view = View(0, identity, peers, peers, len(peers))
    return Proposal(peers[0], kind, -1, "", view)  # type: ignore[arg-type]


def kill(server: RegistryServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    wait_for_end(server.pid)


def wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], 10)[0], f"process {pid} still runs"
    finally:
        os.close(handle)


# --- the records outlive the server -----------------------------------------------------------


def test_a_killed_server_keeps_what_it_acknowledged(own_server: RegistryServer) -> None:
    """After kill -9 every record is there, and the same client goes on: the script is new to it."""
    registry = Registry(own_server.socket, "run", TIMING)
    assert registry.create("the spec", 2)
    peers = [claimed(registry, slot) for slot in range(2)]
    assert registry.admit_hardware("probe") == "probe"
    assert registry.propose(first_view(*peers))
    registry.checkpointed(7)
    registry.leave(peers[1], "out of memory")
    outcome = registry.finish(Outcome("failed", 7, error="OutOfMemory", trace="Traceback …\n"))
    registry.event("note", "1", {"loss": 0.5})
    before, history = registry.read(), registry.read_events()

    kill(own_server)
    own_server.start()
    after = registry.read()

    assert after.life != before.life
    assert after.born == before.born == before.life
    assert after.view == before.view and after.grants == before.grants
    assert after.leased == {peers[0]} and after.departed == {peers[1]}
    assert after.outcome == outcome and after.checkpoint == 7
    assert after.highest_view == 0 and after.target_slots == 2
    assert registry.read_events() == history
    assert registry.spec() == "the spec" and registry.admit_hardware("another") == "probe"
    assert not registry.create("the spec", 2)
    assert not registry.event("note", "1", {"loss": 0.5})


def test_a_dead_server_is_known_to_be_dead(own_server: RegistryServer) -> None:
    """Also while another thread is about to wait for it, when Popen.poll says nothing."""
    process: Any = own_server._process
    with process._waitpid_lock:
        kill(own_server)
        assert not own_server.alive()
    own_server.start()
    assert Registry(own_server.socket, "run", TIMING).read().view is None


def test_no_acknowledged_event_is_lost_in_the_middle_of_a_stream(
    own_server: RegistryServer,
) -> None:
    """Killed while a client writes: the acknowledged ones are there, in order, none twice."""
    acknowledged: list[str] = []
    enough = threading.Event()

    def write() -> None:
        registry = Registry(own_server.socket, "run", TIMING)
        try:
            while True:
                key = str(len(acknowledged))
                registry.event("tick", key, {})
                acknowledged.append(key)
                if len(acknowledged) == 200:
                    enough.set()
        except RegistryUnavailable:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    assert enough.wait(10)
    kill(own_server)
    writer.join()
    own_server.start()
    found = [event.key for event in Registry(own_server.socket, "run", TIMING).read_events()]
    assert found[: len(acknowledged)] == acknowledged
    assert len(found) - len(acknowledged) in (0, 1)  # one may have been stored and not answered


def test_a_renewed_lease_outlives_the_server(own_server: RegistryServer) -> None:
    """Most renewals are not synced, yet a lease read back is short by half its life at most."""
    now = 1000.0
    registry = Registry(own_server.socket, "run", TIMING, timeout_s=10.0, clock=lambda: now)
    registry.create("the spec", 1)
    peer = claimed(registry, 0)
    log = own_server.data / "appendonlydir"
    sizes = []
    for _ in range(40):
        now += 0.1
        registry.contact(Contact(peer, Doing(step=3, computing=0)))
        sizes.append(sum(file.stat().st_size for file in log.iterdir()))
    assert 4 <= len(set(sizes)) <= 6  # forty contacts in two lives of a lease
    kill(own_server)
    own_server.start()
    now += TIMING.lease_ttl_s / 2 - 0.11
    assert registry.read().leased == {peer}
    now += TIMING.lease_ttl_s / 2 + 0.11
    assert registry.read().leased == frozenset()


def test_members_restore_an_empty_registry(own_server: RegistryServer) -> None:
    """The spec and the view come back in one call; nothing says that the run is a fresh one."""
    registry = Registry(own_server.socket, "run", TIMING)
    peers = ("0.3.a", "1.1.b")
    proposal = first_view(*peers, kind="restore")
    assert registry.restore("the spec", 4, proposal)
    snapshot = registry.read()
    assert registry.spec() == "the spec"
    assert snapshot.born == "" and snapshot.life != ""
    assert snapshot.view == proposal.view and snapshot.target_slots == 4
    assert snapshot.leased == set(peers)
    assert {slot: grant.claimant for slot, grant in snapshot.grants.items()} == dict(
        enumerate(peers)
    )
    assert not registry.restore("another", 4, proposal)
    assert registry.spec() == "the spec"


# --- the client -------------------------------------------------------------------------------


def test_an_absent_server_is_named(tmp_path: Path) -> None:
    """No socket, or nobody behind it: RegistryUnavailable at once, with the address."""
    registry = Registry(tmp_path / "nobody.sock", "run", TIMING)
    with pytest.raises(RegistryUnavailable, match=r"nobody\.sock"):
        registry.read()
    with pytest.raises(RegistryUnavailable):
        registry.wait_until_up(0.1)


def test_a_stopped_server_costs_one_timeout(own_server: RegistryServer) -> None:
    """A server that hangs is given up after the timeout; its late answer is never believed."""
    registry = Registry(own_server.socket, "run", TIMING, timeout_s=0.2)
    registry.create("the spec", 2)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for call in (registry.read, lambda: registry.event("late", "1", {}), registry.spec):
            began = time.monotonic()
            with pytest.raises(RegistryUnavailable):
                call()
            assert time.monotonic() - began < 0.5
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    registry.wait_until_up(5)
    assert registry.read().target_slots == 2
    assert registry.spec() == "the spec"
    assert registry.scale(3) and registry.read().target_slots == 3


INTERRUPTED = """
import random, signal, sys
from fault.records import Timing
from fault.registry import Registry

registry = Registry(sys.argv[1], "run", Timing())
signal.signal(signal.SIGALRM, signal.default_int_handler)
for seed in range(1000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-5, 1e-3))
        while True:
            registry.read_events()
    except KeyboardInterrupt:
        pass
registry.ping()
print("alive")
"""


def test_a_ctrl_c_ends_a_call_and_not_the_process(server: RegistryServer) -> None:
    """A thousand of them, each somewhere else in it; the next call works."""
    command = [sys.executable, "-c", INTERRUPTED, server.socket]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    """`wait_until_up` returns as soon as the server answers."""
    server = RegistryServer(tmp_path)
    registry = Registry(server.socket, "run", TIMING)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(registry.wait_until_up, 10)
        server.start()
        waiting.result()
    assert registry.create("the spec", 1)
    server.stop()
    assert not server.alive()
    with pytest.raises(RegistryUnavailable):
        registry.ping()


def test_time_is_the_server_s(server: RegistryServer, run: str) -> None:
    """Without a clock of its own a client speaks of the server's time, to the microsecond."""
    before = time.time()
    now = Registry(server.socket, run, TIMING).read().now
    assert before - 1e-5 <= now <= time.time() + 1e-5


def test_a_server_over_tcp_with_a_password(run: str, tmp_path: Path) -> None:
    """redis:// with a password and a database; a wrong password is the user's to mend."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [server_binary(), "--port", str(port), "--requirepass", "s3cret", "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        registry = Registry(f"redis://:s3cret@127.0.0.1:{port}/1", run, TIMING)
        registry.wait_until_up(10)
        assert registry.create("the spec", 1) and registry.read().target_slots == 1
        assert Registry(f"redis://:s3cret@127.0.0.1:{port}/0", run, TIMING).spec() == ""
        for password in (":wr0ng@", ""):
            refused = Registry(f"redis://{password}127.0.0.1:{port}/1", run, TIMING)
            with pytest.raises(InputError, match="refuses the login") as caught:
                refused.read()
            assert "wr0ng" not in str(caught.value)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("address", "run_id"),
    [("http://host", "run"), ("/tmp/socket", "a}b"), ("/tmp/socket", ""), ("redis://h:port", "r")],
)
def test_what_cannot_be_an_address_is_refused(address: str, run_id: str) -> None:
    """A wrong address or name of a run is told before anything is tried."""
    with pytest.raises(InputError):
        Registry(address, run_id, TIMING)


def test_a_run_can_be_deleted(server: RegistryServer, run: str) -> None:
    """Nothing of it stays behind, and other runs are not touched."""
    registry, other = (Registry(server.socket, name, TIMING) for name in (run, run + "-other"))
    for each in (registry, other):
        each.create("the spec", 1)
        claimed(each, 0)
        each.event("note", "1", {})
    registry.delete_run()
    raw = redis.Redis(unix_socket_path=str(server.socket))
    assert list(raw.scan_iter(f"mayfly:{{{run}}}:*")) == []
    assert registry.spec() == "" and other.spec() == "the spec"


def test_text_of_any_kind_survives(server: RegistryServer, run: str) -> None:
    """Names and tracebacks are stored as they are, whatever they quote."""
    registry = Registry(server.socket, run, TIMING)
    trace = "Traceback\n  \u2192 \U0001f41b '\udcff' \0 end"
    outcome = Outcome("failed", 1, error="Poisoned", reason="größer als …", trace=trace)
    registry.create(trace, 1)
    assert registry.finish(outcome) == outcome
    assert registry.read().outcome == outcome and registry.spec() == trace
    assert registry.finish(Outcome("finished", 9)) == outcome


# --- many at once -----------------------------------------------------------------------------


def at_once(number: int, action: Callable[[int], bool]) -> list[int]:
    """Who of `number` threads got True."""
    barrier = threading.Barrier(number)

    def act(index: int) -> bool:
        barrier.wait()
        return action(index)

    with ThreadPoolExecutor(number) as pool:
        return [index for index, done in enumerate(pool.map(act, range(number))) if done]


def test_of_eight_proposals_one_wins(server: RegistryServer, run: str) -> None:
    """Compare-and-set: in each of many rounds exactly one of eight views is installed."""
    registry = Registry(server.socket, run, TIMING)
    registry.create("the spec", 8)
    peers = tuple([claimed(registry, slot) for slot in range(8)])
    clients = [Registry(server.socket, run, TIMING) for _ in peers]
    assert registry.propose(first_view(*peers))
    for number in range(1, 21):
        old = registry.read().view
        assert old is not None
        proposals = [
            Proposal(
                peer, "change", old.number, old.id, View(number, f"by-{peer}", peers, peers, 8)
            )
            for peer in peers
        ]
        winners = at_once(8, lambda index, offers=proposals: clients[index].propose(offers[index]))
        assert len(winners) == 1
        assert registry.read().view == proposals[winners[0]].view


def test_of_eight_claims_one_wins(server: RegistryServer, run: str) -> None:
    """An event delivered eight times starts one peer."""
    registry = Registry(server.socket, run, TIMING)
    registry.create("the spec", 20)
    clients = [Registry(server.socket, run, TIMING) for _ in range(8)]
    for slot in range(20):
        assert registry.grant(slot, 1, "token", "launcher")
        names = [peer_name(slot, 1, str(index)) for index in range(8)]
        winners = at_once(
            8, lambda index, s=slot, n=names: clients[index].claim(s, 1, "token", n[index])
        )
        assert len(winners) == 1
        assert registry.read().grants[slot].claimant == names[winners[0]]


# --- history ----------------------------------------------------------------------------------


def test_events_happen_once(server: RegistryServer, run: str) -> None:
    """The same (kind, key) is appended once, with its first fields, and read back as plain data."""
    registry = Registry(server.socket, run, TIMING)
    fields = {"loss": 0.1, "step": 3, "who": ["0.1.a"], "none": None, "nested": {"täg": [1, 2.5]}}
    assert registry.event("step", "3", fields)
    assert not registry.event("step", "3", {"loss": 9.0})
    assert registry.event("step", "4", {})
    assert registry.event("other", "3", {})
    first, second, third = registry.read_events()
    assert first == Event(first.id, first.time, "step", "3", fields)
    assert (second.kind, second.key, second.fields) == ("step", "4", {})
    assert abs(first.time - time.time()) < 5
    assert registry.read_events(after_id=first.id) == [second, third]
    assert registry.read_events(count=2) == [first, second]
    assert registry.read_events(after_id=third.id, block_ms=10) == []


def test_operations_write_their_own_history(server: RegistryServer, run: str) -> None:
    """What changed a record is in the stream with it: who was granted, who claimed, which view."""
    registry = Registry(server.socket, run, TIMING)
    registry.create("the spec", 2)
    registry.scale(2)
    registry.scale(1)
    peer = claimed(registry, 0)
    proposal = first_view(peer)
    registry.propose(proposal)
    registry.checkpointed(5)
    registry.checkpointed(5)
    registry.leave(peer, "time")
    registry.leave(peer, "time")
    registry.finish(Outcome("stopped", 5, digest="d"))
    view = proposal.view
    assert [(event.kind, event.fields) for event in registry.read_events()] == [
        ("created", {"slots": 2}),
        ("scaled", {"slots": 1}),
        ("granted", {"slot": 0, "generation": 1, "by": "launcher"}),
        ("claimed", {"slot": 0, "peer": peer}),
        (
            "view",
            {
                "number": 0,
                "id": view.id,
                "kind": "first",
                "proposer": peer,
                "members": [peer],
                "players": [peer],
                "slots": 1,
                "removals": [],
            },
        ),
        ("checkpoint", {"step": 5}),
        ("left", {"peer": peer, "cause": "time"}),
        (
            "outcome",
            {
                "state": "stopped",
                "step": 5,
                "digest": "d",
                "error": "",
                "reason": "",
                "trace": "",
            },
        ),
    ]


def test_a_reader_is_woken_by_an_event(server: RegistryServer, run: str) -> None:
    """A blocking read longer than the timeout waits, and returns with the event."""
    reader = Registry(server.socket, run, TIMING, timeout_s=0.2)
    raw = redis.Redis(unix_socket_path=str(server.socket))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.read_events, "0-0", 10_000)
        while not raw.info("clients")["blocked_clients"]:
            assert not waiting.done()
        assert Registry(server.socket, run, TIMING).event("tick", "1", {})
        assert [event.key for event in waiting.result(5)] == ["1"]
    assert reader.read_events("0-0", 10)  # and its connection is in order


def test_history_is_bounded(server: RegistryServer, run: str) -> None:
    """The stream and the memory of what was seen keep the newest hundred thousand or so."""
    raw = redis.Redis(unix_socket_path=str(server.socket))
    keys = {name: f"mayfly:{{{run}}}:{name}" for name in RECORDS}
    fill = """
    for i = 1, 100500 do
      redis.call('ZADD', KEYS[1], i, 'tick\\0' .. i)
      redis.call('XADD', KEYS[2], '*', 'kind', 'tick')
    end
    """
    raw.eval(fill, 2, keys["seen"], keys["events"])
    registry = Registry(server.socket, run, TIMING)
    assert registry.event("tick", "newest", {})
    assert raw.zcard(keys["seen"]) == 100_000
    assert 100_000 <= raw.xlen(keys["events"]) < 100_500
    assert not registry.event("tick", "newest", {})
    registry.delete_run()


# --- the server's process ---------------------------------------------------------------------


def test_a_long_home_gets_a_short_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder too deep for a Unix socket is reached through a private link, always the same."""
    short = tempfile.mkdtemp(prefix="m")
    monkeypatch.setattr(tempfile, "tempdir", short)
    folder = tmp_path / ("deep folder, größer " * 4) / ("x" * 60)
    try:
        server = RegistryServer(folder)
        server.start()
        assert len(os.fsencode(server.socket)) <= 103
        assert server.socket.samefile(folder / "registry.sock")
        assert Registry(server.socket, "run", TIMING).create("the spec", 1)
        server.stop()
        again = RegistryServer(folder)
        assert again.socket == server.socket
        again.start()
        assert Registry(f"unix://{again.socket}", "run", TIMING).spec() == "the spec"
        again.stop()
        (Path(short) / f"mayfly-{os.getuid()}").chmod(0o755)
        with pytest.raises(InputError, match="alone"):
            short_folder(folder, 13)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with pytest.raises(InputError, match="TMPDIR"):
            short_folder(folder, 13)
    finally:
        shutil.rmtree(short)


def test_the_server_dies_with_its_supervisor(tmp_path: Path) -> None:
    """Even when the supervisor is killed, and though the thread that started it is gone."""
    program = """
import sys, threading
from pathlib import Path
from launcher.registry_server import RegistryServer
server = RegistryServer(Path(sys.argv[1]))
starter = threading.Thread(target=server.start)
starter.start(); starter.join()
print(server.pid, flush=True)
sys.stdin.read()
"""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert supervisor.stdout is not None and supervisor.stdin is not None
    with supervisor:
        pid = int(supervisor.stdout.readline())
        registry = Registry(tmp_path / "registry.sock", "run", TIMING)
        assert registry.create("the spec", 1)
        supervisor.kill()
    wait_for_end(pid)
    with pytest.raises(RegistryUnavailable):
        registry.ping()
    successor = RegistryServer(tmp_path)
    successor.start()
    assert registry.spec() == "the spec"
    successor.stop()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The error names the log and quotes its last line; a second server is refused."""
    server = RegistryServer(tmp_path)
    log_folder = server.data / "appendonlydir"
    log_folder.write_text("in the way of the append-only files")
    with pytest.raises(RegistryUnavailable, match=r"registry\.log says why: .*appendonlydir"):
        server.start()
    assert not server.alive()
    log_folder.unlink()
    server.start()
    with pytest.raises(RegistryUnavailable, match="already running"):
        RegistryServer(tmp_path).start()
    server.stop()
