"""Where an event goes, by a function's `start`: new processes, free ones, or forks of a snapshot.

One of two task roots hides torch, which costs a snapshot seconds and matters to few of the tests.
Handlers speak to the tests through a listening socket: a connection tells what a process is doing,
holds it until the test lets it go, and breaks when the process is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0

HANDLERS = '''
import json, os, random, signal, socket, subprocess, sys, threading
import numpy
from snapshot_restore_py import register_after_restore

calls = 0
kept = []
restored = []
register_after_restore(restored.append, os.getpid())

def meet(about):
    connection = socket.create_connection(("127.0.0.1", int(os.environ["GATE"])))
    connection.sendall((json.dumps({"pid": os.getpid(), "about": about}) + "\\n").encode())
    return connection

def handle(event, context):
    global calls
    calls += 1
    return globals()[event.get("do", "describe")](event)

def describe(event):
    print("described", event.get("word"))
    with open("/proc/self/environ") as shown:
        marks = [each for each in shown.read().split("\\0") if "LOG_STREAM" in each]
    shown = subprocess.run(["env"], capture_output=True, text=True).stdout.splitlines()
    return {
        "calls": calls, "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
        "environment": dict(os.environ), "child_environment": shown, "marks": marks,
        "directory": os.getcwd(), "path": sys.path, "restored": restored,
        "drawn": [random.random(), numpy.random.random()],
        "modules": list(sys.modules), "hash": hash("word"),
        "signals": [signal.getsignal(signal.SIGTERM), list(signal.pthread_sigmask(0, ()))],
        "descriptors": [os.readlink(f"/proc/self/fd/{each}") for each in (0, 1, 2)],
    }

def wait(event):
    with meet(event.get("word")) as connection:
        connection.recv(1)
    return {"pid": os.getpid(), "calls": calls}

def spawn(event):
    """Leaves a forked and an executed child, each in a session of its own, and waits."""
    if os.fork() == 0:
        os.setsid()
        meet("forked").recv(1)
        os._exit(0)
    code = "import handlers; handlers.meet('executed').recv(1)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    return wait(event)

def hang(event):
    threading.Event().wait()

def leave(event):
    os._exit(3)

def fail(event):
    raise ValueError("this handler always fails")

def grow(event):
    kept.append(b"x" * (512 << 20))
    return hang(event)
'''

MEDDLER = """
import os, signal
os.environ["MEDDLED"] = "yes"
os.chdir("/")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
"""

COMPUTING = """
import torch

def handle(event, context):
    drawn = torch.rand(1).item()
    inherited = torch.get_num_threads()
    torch.set_num_threads(2)  # hangs if the parent has ever computed with two
    model = torch.nn.Linear(64, 64)
    model(torch.ones(40_000, 64)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    return {"drawn": drawn, "threads": inherited}
"""

STANDARD: dict[str, Any] = {"handler": "handlers.handle", "timeout_s": 60, "memory_mb": 400}
SNAPSHOT = STANDARD | {"start": "snapshot", "retry_delays_s": []}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "plain": SNAPSHOT | {"preload": ["nowhere.at_all", "meddler"]},
    "hasty": SNAPSHOT | {"timeout_s": 0.3},
    "small": SNAPSHOT | {"memory_mb": 200},
    "absent": SNAPSHOT | {"handler": "nowhere.handle"},
    "peer": SNAPSHOT | {"handler": "launcher.handler.handle", "memory_mb": 2000},
    "computing": SNAPSHOT | {"handler": "computing.handle", "memory_mb": 2000},
    "cold": STANDARD | {"start": "cold", "concurrency": 1},
}
WITH_TORCH = ("peer", "computing")


class Visitor:
    """A process that has come to the gate."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self.connection = connection
        told = json.loads(connection.makefile().readline())
        self.pid: int = told["pid"]
        self.about = told["about"]

    def release(self) -> None:
        self.connection.sendall(b"!")

    def await_death(self) -> None:
        try:
            assert self.connection.recv(1) == b""
        except ConnectionResetError:
            return

    def is_there(self) -> bool:
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1) != b""
        except BlockingIOError:
            return True
        finally:
            self.connection.settimeout(PATIENCE_S)


class Running:
    """An emulator's process, and the gate that its functions' processes come to."""

    def __init__(self, folder: Path, functions: dict[str, dict[str, Any]]) -> None:
        self.root = folder / "root"
        self.logs = folder / "logs"
        for root, hides in ((self.root, True), (folder / "with_torch", False)):
            root.mkdir()
            (root / "handlers.py").write_text(HANDLERS)
            (root / "computing.py").write_text(COMPUTING)
            (root / "meddler.py").write_text(MEDDLER)
            (root / "fatal.py").write_text("import os\nos._exit(7)\n")
            (root / "endless.py").write_text("import handlers\nhandlers.meet('endless').recv(1)\n")
            (root / "guest.py").write_text("import handlers\nkept = handlers.meet('snapshot')\n")
            for hidden in ("torch", "boto3", "redis") if hides else ():
                (root / f"{hidden}.py").write_text("raise ImportError('it is hidden')\n")
        self.gate = socket.create_server(("127.0.0.1", 0))
        self.gate.settimeout(PATIENCE_S)
        environment = {"GATE": str(self.gate.getsockname()[1]), "PYTHONHASHSEED": "0"}
        config = folder / "functions.json"
        settings = {
            name: {
                "working_directory": str(folder / "with_torch" if name in WITH_TORCH else self.root)
            }
            | {"environment": environment}
            | function
            for name, function in functions.items()
        }
        config.write_text(json.dumps({"functions": settings}))
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "launcher.emulator", "--config", config]
        self.process = subprocess.Popen(
            [*command, "--ready-file", ready, "--log-dir", self.logs],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = [self.process.stderr.readline()]
        assert "serving" in self.said[0], self.said
        self.reader = threading.Thread(target=self.said.extend, args=(self.process.stderr,))
        self.reader.start()
        self.endpoint: str = json.loads(ready.read_text())["endpoint"]

    def call(self, function: str, **event: Any) -> Any:
        """A synchronous call; what came back."""
        path = f"2015-03-31/functions/{function}/invocations"
        return self._request(path, json.dumps(event).encode())

    def ended(self, function: str) -> dict[str, Any]:
        """The last attempt that ended."""
        records = self._request("mayfly/ended")
        return [record for record in records if record["function"] == function][-1]

    def log(self, record: dict[str, Any]) -> str:
        return (self.logs / f"{record['sandbox']}.log").read_text()

    def snapshot_log(self) -> str:
        """What the snapshots wrote; functions that would have the same one share it."""
        return "".join(log.read_text() for log in self.logs.glob("*-snapshot-*.log"))

    def kill(self, pid: int) -> None:
        """Ends a free sandbox's process, and waits until no event can be given to it any more."""
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + PATIENCE_S
        while any(sandbox["pid"] == pid for sandbox in self._request("mayfly/sandboxes")):
            assert time.monotonic() < until
            time.sleep(0.01)

    def visitor(self) -> Visitor:
        return Visitor(self.gate.accept()[0])

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(PATIENCE_S)
        self.reader.join(PATIENCE_S)
        self.gate.close()
        return code

    def _request(self, path: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self.endpoint}/{path}", data, PATIENCE_S) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("emulator"), FUNCTIONS)
    yield running
    assert running.stop() == 0
    assert not any("Traceback" in line for line in running.said), running.said


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


# --- what a forked process is ----------------------------------------------------------------


def test_a_forked_process_is_as_a_fresh_one(emulator: Running) -> None:
    """A first event goes to a fork of the snapshot, which has its own environment, folder, import
    path, log and signals, has run its hooks, and serves the next event as a warm process."""
    found = emulator.call("plain", word="hello")
    record = emulator.ended("plain")
    environment = found["environment"]
    assert (record["start"], record["pid"]) == ("restored", found["pid"])
    assert found["group"] == found["pid"]
    assert environment["AWS_LAMBDA_INITIALIZATION_TYPE"] == "snap-start"
    assert environment["AWS_LAMBDA_RUNTIME_API"].endswith(f"/{record['sandbox']}")
    assert set(found["child_environment"]) >= {
        f"{name}={environment[name]}" for name in environment
    }
    assert not any("-snapshot-" in each for each in found["child_environment"])
    assert found["marks"] == [f"AWS_LAMBDA_LOG_STREAM_NAME=mayfly/[$LATEST]{record['sandbox']}"]
    assert found["directory"] == str(emulator.root) == found["path"][0]
    assert str(emulator.root) not in found["path"][1:]
    assert found["restored"] == [found["pid"]]
    log = str(emulator.logs / f"{record['sandbox']}.log")
    assert found["descriptors"] == ["/dev/null", log, log]
    assert found["signals"] == [int(signal.SIG_DFL), []]
    assert "MEDDLED" not in environment
    assert "described hello" in emulator.log(record)

    assert emulator.call("plain")["pid"] == found["pid"]
    assert emulator.ended("plain")["start"] == "warm"
    assert "Start: warm" in emulator.log(record)


def test_two_forks_share_nothing(emulator: Running, calls: ThreadPoolExecutor) -> None:
    """What one child does, another does not see; they draw different numbers, hash alike, and one
    that dies leaves the other alone."""
    holding = calls.submit(emulator.call, "plain", do="wait")
    held = emulator.visitor()
    one = emulator.call("plain")
    emulator.kill(one["pid"])
    assert held.is_there()
    other = emulator.call("plain")
    assert other["calls"] == 1
    assert other["pid"] not in (one["pid"], held.pid)
    assert other["parent"] == one["parent"]
    assert other["hash"] == one["hash"]
    assert not set(other["drawn"]) & set(one["drawn"])
    held.release()
    assert holding.result()["pid"] == held.pid


def test_a_fork_computes_as_a_fresh_process(emulator: Running) -> None:
    """torch in a child has as many threads as in a fresh process and numbers of its own to draw,
    and computes with two threads although its parent computed as well."""
    code = "import torch; print(torch.get_num_threads())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    drawn = set()
    for _ in range(2):
        found = emulator.call("computing")
        record = emulator.ended("computing")
        assert record["start"] == "restored"
        assert found["threads"] == int(fresh.stdout)
        drawn.add(found["drawn"])
        emulator.kill(record["pid"])
    assert len(drawn) == 2


def test_a_peer_says_how_it_was_started(emulator: Running) -> None:
    """Mayfly's handler calls the first invocation of a forked process restored, the next warm."""
    for start in ("restored", "warm"):
        # it says so before it finds that this is no event for it
        emulator.call("peer", slot=4, generation=2)
        record = emulator.ended("peer")
        assert record["start"] == start
        assert f"slot 4, generation 2, {start} start\n" in emulator.log(record)


def test_what_cannot_be_preloaded_is_a_line_in_the_log(emulator: Running) -> None:
    """A module to preload that does not exist is skipped and named; one that does is there."""
    assert "meddler" in emulator.call("plain")["modules"]
    log = emulator.snapshot_log()
    assert "nowhere.at_all is skipped: ModuleNotFoundError" in log
    assert "torch is skipped: ImportError: it is hidden" in log


# --- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "do", "cause", "status", "words"),
    [
        ("hasty", "hang", "timeout", -9, "Task timed out after 0.30 seconds"),
        ("small", "grow", "out of memory", -9, "more than its 200 MB"),
        ("small", "leave", "crash", 3, "exit status 3"),
        ("small", "fail", "error", None, "this handler always fails"),
        ("absent", "", "init", 1, "No module named 'nowhere'"),
    ],
)
def test_a_forked_process_ends_as_a_cold_one(
    emulator: Running, function: str, do: str, cause: str, status: int | None, words: str
) -> None:
    """Limits, crashes and errors are told with their cause and the exit status."""
    emulator.call(function, do=do)
    record = emulator.ended(function)
    assert (record["start"], record["cause"], record["exit"]) == ("restored", cause, status)
    assert words in record["detail"]["errorMessage"]


def test_a_fork_takes_along_what_it_started_and_nothing_else(
    emulator: Running, calls: ThreadPoolExecutor
) -> None:
    """With a sandbox end its children that left its session, whether executed or forked, but
    neither another sandbox nor the snapshot."""
    holding = calls.submit(emulator.call, "plain", do="wait", word="other")
    other = emulator.visitor()
    snapshot = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[1])
    spawning = calls.submit(emulator.call, "plain", do="spawn", word="parent")
    visitors = {visitor.about: visitor for visitor in (emulator.visitor() for _ in range(3))}
    assert visitors.keys() == {"parent", "executed", "forked"}
    os.kill(visitors["parent"].pid, signal.SIGKILL)
    for visitor in visitors.values():
        visitor.await_death()
    assert spawning.result()["errorType"] == "Runtime.ExitError"
    assert other.is_there()
    other.release()
    holding.result()
    assert emulator.call("plain", do="describe")["parent"] == snapshot


def test_a_dead_snapshot_is_made_anew(emulator: Running, calls: ThreadPoolExecutor) -> None:
    """A snapshot that is SIGKILLed takes its children along, which counts as their crash; the
    next start has a new one."""
    before = emulator.call("plain")
    waiting = calls.submit(emulator.call, "plain", do="wait")
    visitor = emulator.visitor()
    os.kill(before["parent"], signal.SIGKILL)
    visitor.await_death()
    assert waiting.result()["errorMessage"].endswith("signal: killed")
    record = emulator.ended("plain")
    assert (record["cause"], record["exit"]) == ("crash", -signal.SIGKILL)
    after = emulator.call("plain")
    assert after["parent"] != before["parent"]
    assert emulator.ended("plain")["start"] == "restored"


def test_a_snapshot_that_cannot_be_made_fails_the_attempt(
    tmp_path: Path, calls: ThreadPoolExecutor
) -> None:
    """A snapshot whose process dies whenever it is made is the reason of an init failure, for
    every start that waits for it."""
    running = Running(tmp_path, {"fatal": SNAPSHOT | {"preload": ["fatal"]}})
    for asked in [calls.submit(running.call, "fatal") for _ in range(4)]:
        answer = asked.result()
        assert answer["errorType"] == "Runtime.StartError"
        assert "no snapshot of fatal" in answer["errorMessage"]
        assert "exit status 7" in answer["errorMessage"]
    record = running.ended("fatal")
    assert (record["cause"], record["exit"]) == ("init", None)
    assert running.stop() == 0
    assert not any("Traceback" in line for line in running.said), running.said


def test_a_folder_that_is_gone_fails_the_attempt(tmp_path: Path) -> None:
    """What keeps a child from becoming a sandbox's process is the reason of an init failure."""
    running = Running(tmp_path, {"plain": SNAPSHOT})
    running.call("plain", do="leave")
    shutil.rmtree(running.root)
    assert "No such file or directory" in running.call("plain")["errorMessage"]
    assert running.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_emulator(
    tmp_path: Path, calls: ThreadPoolExecutor, number: signal.Signals
) -> None:
    """However the emulator ends, so do its snapshots, their children, and what those started."""
    running = Running(tmp_path, {"plain": SNAPSHOT | {"preload": ["guest"]}})
    visitors = [running.visitor()]
    assert visitors[0].about == "snapshot"
    calls.submit(running.call, "plain", do="spawn")
    visitors += [running.visitor() for _ in range(3)]
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else -number)
    # the snapshot's connection is its children's as well: it breaks when the last one is gone
    for visitor in visitors:
        visitor.await_death()
    running.reader.join(PATIENCE_S)  # the warden is the last to hold the other end
    assert not running.reader.is_alive()
    running.gate.close()


def test_an_emulator_ends_while_its_snapshot_is_made(tmp_path: Path) -> None:
    """SIGTERM does not wait for a snapshot, nor for a start that waits for one."""
    running = Running(tmp_path, {"plain": SNAPSHOT | {"preload": ["endless"]}})
    making = running.visitor()
    path = f"{running.endpoint}/2015-03-31/functions/plain/invocations"
    asked = urllib.request.Request(path, b"{}", {"X-Amz-Invocation-Type": "Event"})
    urllib.request.urlopen(asked, timeout=PATIENCE_S).close()
    assert running.stop() == 0
    making.await_death()


# --- cold ------------------------------------------------------------------------------------


def test_a_cold_function_never_reuses_a_process(emulator: Running) -> None:
    """With start "cold" every event has a process of its own, also after an error, and one that
    is still ending takes no place."""
    found = []
    for do in ("describe", "fail", "describe", "describe"):
        found.append(emulator.call("cold", do=do))
        record = emulator.ended("cold")
        assert (record["start"], record["cause"]) == ("cold", "error" if do == "fail" else "ok")
    assert [each["calls"] for each in found if "calls" in each] == [1, 1, 1]
    assert len({each["pid"] for each in found if "pid" in each}) == 3
    assert found[0]["environment"]["AWS_LAMBDA_INITIALIZATION_TYPE"] == "on-demand"


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": "tepid"}, "'start' must be one of cold, warm, snapshot"),
        ({"start": ["cold"]}, "'start' must be one of cold, warm, snapshot"),
        ({"preload": "numpy"}, "'preload' must be a list of names of modules"),
        ({"preload": ["a b"]}, "'preload' must be a list of names of modules"),
    ],
)
def test_bad_input_is_one_line(
    settings: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that there is not, or a module that can have no such name, is refused by name."""
    from launcher.emulator.__main__ import main

    file = tmp_path / "functions.json"
    file.write_text(json.dumps({"functions": {"f": {"handler": "a.b"} | settings}}))
    assert main(["--config", str(file), "--log-dir", str(tmp_path / "logs")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
