"""`p2p-launch store`, as its user starts, uses and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from tests.ports import free_port

COMMAND = str(Path(sys.executable).with_name("p2p-launch"))
Start = Callable[..., "Running"]


class Running:
    """The command in its own process."""

    def __init__(self, home: Path, *options: str) -> None:
        command = [COMMAND, "store", "--home", str(home), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("store at "):
                return
        raise AssertionError(f"it ended with {self.process.wait()}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Running] = []

    def begin(*options: str) -> Running:
        running.append(Running(tmp_path / "home", *options))
        return running[-1]

    yield begin
    for each in running:
        with contextlib.suppress(ProcessLookupError):
            each.process.kill()
        each.process.communicate()


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(start: Start, number: int) -> None:
    """Tensors go in and out; after the signal it ends with 0 and its server is gone."""
    port = free_port()
    running = start("--listen", f"127.0.0.1:{port}")
    running.wait_until_ready()
    servers = children_of(running.process.pid)
    with redis.Redis(port=port) as client:
        values = np.arange(6, dtype=np.float32)
        client.execute_command("AI.TENSORSET", "x", "FLOAT", 2, 3, "BLOB", values.tobytes())
        assert client.execute_command("AI.TENSORGET", "x", "BLOB") == values.tobytes()
    code, _ = running.end(number)
    assert code == 0 and servers
    for server in servers:
        assert not Path(f"/proc/{server}").exists()


@pytest.mark.timeout(300)
def test_what_is_persisted_outlives_a_kill(start: Start, tmp_path: Path) -> None:
    """After SIGKILL of command and server, a new store over the folder has tensor and script."""
    port = free_port()
    options = ("--listen", f"127.0.0.1:{port}", "--persist", str(tmp_path / "kept"))
    source = "def f(tensors: List[Tensor], keys: List[str], args: List[str]):\n return tensors[0]\n"
    running = start(*options)
    running.wait_until_ready()
    with redis.Redis(port=port) as client:
        client.config_set("appendfsync", "always")
        client.execute_command("AI.TENSORSET", "x", "FLOAT", 1, "VALUES", 7)
        client.execute_command(
            "AI.SCRIPTSTORE", "s", "CPU", "ENTRY_POINTS", 1, "f", "SOURCE", source
        )
    for pid in [*children_of(running.process.pid), running.process.pid]:
        os.kill(pid, signal.SIGKILL)
    running.process.wait()
    again = start(*options)
    again.wait_until_ready()
    with redis.Redis(port=port) as client:
        client.execute_command("AI.SCRIPTEXECUTE", "s", "f", "INPUTS", 1, "x", "OUTPUTS", 1, "y")
        assert client.execute_command("AI.TENSORGET", "y", "VALUES") == [b"7"]


@pytest.mark.timeout(300)
def test_the_password_is_asked_for_and_told_to_nobody(start: Start, tmp_path: Path) -> None:
    """Without it nothing is answered; neither arguments nor log have it."""
    port, secret = free_port(), "correct horse"
    (tmp_path / "password").write_text(f"{secret}\n")
    running = start("--listen", f"127.0.0.1:{port}", "--password-file", str(tmp_path / "password"))
    running.wait_until_ready()
    with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    with redis.Redis(port=port, password=secret) as client:
        assert client.ping()
    for pid in [running.process.pid, *children_of(running.process.pid)]:
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for log in (tmp_path / "home").rglob("*.log"):
        assert secret not in log.read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        pytest.param(["--listen", "nowhere"], 2, "write it as HOST:PORT", id="no-port"),
        pytest.param(["--listen", "127.0.0.1:99999"], 2, "write it as HOST:PORT", id="odd-port"),
        pytest.param(["--listen", "0.0.0.0:7399"], 2, "needs a password", id="open-to-all"),
        pytest.param(["--password-file", "/no/file"], 2, "/no/file", id="no-password-file"),
        pytest.param(["--password-file", "/dev/null"], 2, "is empty", id="empty-password"),
        pytest.param(["--persist", "/dev/null/x"], 2, "/dev/null/x", id="no-folder"),
        pytest.param(["--home", "/dev/null/x"], 2, "--home /dev/null/x", id="no-home"),
        pytest.param(
            ["--listen", "192.0.2.1:7399", "--password-file", "/etc/hostname"],
            2,
            "no address of this machine",
            id="elsewhere",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    start: Start, options: list[str], code: int, words: str
) -> None:
    """Bad input ends it with its exit code and one line that says what to do."""
    running = start(*options)
    _, said = running.process.communicate(timeout=120)
    assert running.process.returncode == code
    assert words in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.timeout(300)
def test_a_folder_is_for_one_store(start: Start, tmp_path: Path) -> None:
    """A second one over the same files is refused, and the first one's stay whole."""
    kept = str(tmp_path / "kept")
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", "--persist", kept).wait_until_ready()
    second = start("--listen", f"127.0.0.1:{free_port()}", "--persist", kept)
    _, said = second.process.communicate(timeout=120)
    assert second.process.returncode == 2
    assert "another store is using it" in said.splitlines()[-1]
    with redis.Redis(port=port) as client:
        assert client.set("a", 1)


@pytest.mark.timeout(300)
def test_damaged_files_are_named(start: Start, tmp_path: Path) -> None:
    """A store whose files cannot be read says why."""
    folder = tmp_path / "kept" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_bytes(b"\0damaged\n")
    running = start("--listen", f"127.0.0.1:{free_port()}", "--persist", str(tmp_path / "kept"))
    _, said = running.process.communicate(timeout=120)
    assert running.process.returncode == 37
    assert "AOF" in said.splitlines()[-1] or "manifest" in said.splitlines()[-1], said


@pytest.mark.timeout(300)
def test_a_port_in_use(start: Start) -> None:
    """A port that something else listens on is an error that names it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = start("--listen", f"127.0.0.1:{port}")
        _, said = running.process.communicate(timeout=120)
    assert running.process.returncode == 37 and str(port) in said.splitlines()[-1]


def test_no_compiler(tmp_path: Path) -> None:
    """Where the engine is not there yet and cannot be made, the line says what to install."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "CXX": ""}
    command = [COMMAND, "store", "--home", str(tmp_path / "home")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 36
    (line,) = ended.stderr.splitlines()
    assert "install g++" in line
