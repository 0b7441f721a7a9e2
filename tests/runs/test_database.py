"""Gradients summed and applied in a store: the weights do not depend on who dies, or where."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.live import (
    Fault,
    Kill,
    KillEverything,
    KillPart,
    KillWorkers,
    LiveRun,
    Result,
    Workload,
)
from fault.errors import StoreUnavailable
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.storing import check_store
from tests.p2p.aggregate.conftest import server_or_skip
from tests.ports import free_port

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
STEPS = 240
WORK = Workload(JOB, STEPS, "ring", shards=2)
DATABASE = ("--peers", "2", "--workers", "2", "--aggregate", "database")
Play = Callable[..., Result]

SCENARIOS: dict[str, tuple[tuple[Fault, ...], tuple[str, ...]]] = {
    "a-worker": ((KillWorkers(60, 0, (1,)),), ()),
    "all-workers-of-a-peer": ((KillWorkers(60, 1, (0, 1)),), ()),
    "a-lead": ((Kill(60, (0,)),), ()),
    "lead-and-workers": ((Kill(60, (1,)), KillWorkers(61, 1, (0, 1))), ()),
    "both-leads": ((Kill(60, (0, 1)),), ()),
    "the-store": ((KillPart(60, ("store-0",)),), ()),
    "the-store-twice": ((KillPart(60, ("store-0",)), KillPart(150, ("store-0",))), ()),
    "stores-per-peer": ((), ("--stores", "per-peer")),
    "one-of-two-stores": ((KillPart(60, ("store-1",)),), ("--stores", "per-peer")),
    "everything": ((KillEverything(120),), ()),
}
IN_EVERY_TEST_RUN = {"a-worker", "the-store"}


@pytest.fixture(scope="session")
def reference(run: Play) -> Result:
    """The run in which nothing fails."""
    return run(WORK, "database-reference", options=DATABASE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_TEST_RUN else [pytest.mark.acceptance])
        for name in SCENARIOS
    ],
)
def test_the_weights_are_those_of_a_run_without_faults(
    scenario: str, run: Play, reference: Result
) -> None:
    """Killed workers, leads and stores, and where the stores are, change not one bit."""
    faults, options = SCENARIOS[scenario]
    result = run(WORK, f"database-{scenario}", *faults, options=(*DATABASE, *options))
    assert result.weights == reference.weights
    assert result.summary["steps"] == STEPS
    assert result.summary["metrics"]["accuracy"] >= 0.95


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_time_limits_change_nothing(run: Play) -> None:
    """Leads hand over and workers are replaced, again and again; the weights are the same."""
    work = Workload(JOB, 1500, "ring", shards=2)
    calm = run(work, "database-calm", options=DATABASE)
    short = run(work, "database-time-limits", options=(*DATABASE, "--time-limit", "15"))
    assert calm.summary["handovers"] == 0 and short.summary["handovers"] >= 2
    assert short.weights == calm.weights


# --- a store of one's own ---------------------------------------------------------------------


class OwnStore:
    """`p2p-launch store`, as a user starts it on another machine."""

    def __init__(self, home: Path, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._command = ["p2p-launch", "store", "--listen", self.address, "--home", str(home)]
        self._command += options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, url: str) -> None:
        self._process = subprocess.Popen(
            self._command, start_new_session=True, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(StoreUnavailable):
                return check_store(url)
            time.sleep(0.1)
        raise TimeoutError(f"no store at {self.address}")

    def kill(self) -> None:
        """The command and its server, at the same moment."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def own_store(home: Path, url: str, *options: str) -> Iterator[tuple[OwnStore, str]]:
    store = OwnStore(home, *options)
    url = url.format(store.address)
    store.start(url)
    try:
        yield store, url
    finally:
        store.kill()


@dataclass(frozen=True)
class Restart:
    """SIGKILL to a store of one's own, which is started again a moment later."""

    step: int
    store: OwnStore
    url: str

    def strike(self, run: LiveRun) -> None:
        self.store.kill()
        time.sleep(0.5)
        self.store.start(self.url)


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("persists", [True, False], ids=["persisted", "empty"])
def test_a_store_of_ones_own_may_die(
    persists: bool, run: Play, reference: Result, tmp_path: Path
) -> None:
    """Killed in the middle of steps, and back with what it had written, or with nothing."""
    password = tmp_path / "password"
    password.write_text("secret word\n")
    options = ["--password-file", str(password)]
    options += ["--persist", str(tmp_path / "data")] if persists else []
    with own_store(tmp_path, f"redis://{{}}?password_file={password}", *options) as (store, url):
        faults = (Restart(60, store, url), Restart(150, store, url))
        name = f"database-own-{'persisted' if persists else 'empty'}"
        result = run(WORK, name, *faults, options=(*DATABASE, "--store", url))
        with BulkConnection(url) as left:
            assert [key for key in left.items("KEYS", "*") if not key.startswith(b"mayfly:")] == []
    assert result.weights == reference.weights


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_a_full_store_ends_the_run_and_it_can_be_resumed(
    home: Path, reference: Result, tmp_path: Path
) -> None:
    """The store's own words are the reason; with more memory the run comes to the same weights."""
    with own_store(tmp_path, "redis://{}") as (_, url), BulkConnection(url) as store:
        options = [*WORK.options, *DATABASE, "--store", url, "--checkpoint-every", "20"]
        with LiveRun(JOB, home, "database-full", options) as live:
            live.wait_for_step(60)
            store.execute("CONFIG", "SET", "maxmemory", "1mb")
            with pytest.raises(RuntimeError, match="exit code 38"):
                live.result()
            assert f"the store at {url.removeprefix('redis://')}: OOM" in live.said()
            store.execute("CONFIG", "SET", "maxmemory", "0")
            live.resume()
            assert live.result().weights == reference.weights


@dataclass(frozen=True)
class RemoveTensors:
    """Somebody deletes tensors of the run, again and again."""

    step: int
    url: str
    times: int = 30

    def strike(self, run: LiveRun) -> None:
        with BulkConnection(self.url) as store:
            for number in range(self.times):
                keys = [key for key in store.items("KEYS", "*") if not key.endswith(b":ready")]
                if keys:
                    store.execute("DEL", sorted(keys)[number * 7919 % len(keys)])
                time.sleep(0.02)


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_whatever_is_removed_from_a_store_is_put_there_again(
    run: Play, reference: Result, tmp_path: Path
) -> None:
    with own_store(tmp_path, "redis://{}") as (_, url):
        faults = (RemoveTensors(40, url), RemoveTensors(120, url))
        result = run(WORK, "database-removed", *faults, options=(*DATABASE, "--store", url))
    assert result.weights == reference.weights


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_a_store_on_debians_redis_works_alike(run: Play, reference: Result, tmp_path: Path) -> None:
    """The same bits from another server with the engine."""
    port = free_port()
    store = server_or_skip("redis", tmp_path)
    store.start("--port", str(port), "--bind", "127.0.0.1")
    try:
        url = f"redis://127.0.0.1:{port}"
        result = run(WORK, "database-debian", options=(*DATABASE, "--store", url))
    finally:
        store.stop()
    assert result.weights == reference.weights


# --- without workers --------------------------------------------------------------------------


@dataclass(frozen=True)
class NoWorkers:
    """For so long no worker of a slot lives longer than a moment; its lead gets on all the same."""

    step: int
    slot: int
    seconds: float
    reached: list[int]

    def strike(self, run: LiveRun) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            for pid in [pid for pids in run.workers_of(self.slot).values() for pid in pids]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        warnings = [e.fields["text"] for e in run.folder.read_events() if e.kind == "warning"]
        assert any("computing alone" in text for text in warnings), warnings
        self.reached.append(run.wait_for_step(0))


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_a_lead_without_workers_computes_alone(run: Play, reference: Result) -> None:
    """Nothing but its workers is missing, so the run is slow, and goes on."""
    reached: list[int] = []
    fault = NoWorkers(60, 0, 40.0, reached)
    result = run(WORK, "database-no-workers", fault, options=DATABASE)
    assert reached and reached[0] >= 65
    assert result.weights == reference.weights


# --- robust rules -----------------------------------------------------------------------------

ROBUST = (
    *("--peers", "3", "--workers", "3", "--aggregate", "database", "--robust", "trimmed_mean"),
    *("--sabotage", "1"),
)
THREE = Workload(JOB, 120, "ring", shards=3)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_robust_rule_is_as_exact(run: Play) -> None:
    """Over workers and peers, one of which sends wrong gradients, whatever dies wherever it is."""
    calm = run(THREE, "robust-reference", options=ROBUST)
    assert calm.summary["metrics"]["accuracy"] >= 0.9
    faults: tuple[Fault, ...] = (Kill(30, (0,)), KillWorkers(60, 2, (0, 1)))
    shared = run(THREE, "robust-shared", *faults, KillPart(90, ("store-0",)), options=ROBUST)
    per_peer = (*ROBUST, "--stores", "per-peer")
    apart = run(THREE, "robust-apart", *faults, KillPart(90, ("store-1",)), options=per_peer)
    assert shared.weights == calm.weights
    assert apart.weights == calm.weights
