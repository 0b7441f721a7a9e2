"""A store: a Valkey or Redis with the engine loaded, that keeps tensors and runs scripts on them.

The run's own stores and `p2p-launch store` are this one. By default it listens on a Unix socket
that only this user can enter, and writes nothing to disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from fault.errors import InputError, StoreUnavailable
from launcher.database_server import DatabaseServer, quoted, short_folder
from p2p.aggregate.engine.build import engine_path
from p2p.transport.hosts import is_loopback

LONGEST_ARGUMENT = 16 << 30
"""Bytes; the server's default of 512 MB is less than a large model's parameters."""
START_S = 120.0
"""A persisted store answers only when it has read its files."""
ASKING: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
"""Something else may listen there, and say nothing."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a store listens: a TCP address, or a Unix socket in a folder."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """`HOST:PORT`, an IPv6 host in brackets. Raises InputError."""
        host, separator, port = text.rpartition(":")
        if not separator or not port.isdigit() or not 0 < int(port) < 65536 or not host:
            raise InputError(f"--listen {text}: write it as HOST:PORT, as in 127.0.0.1:7379")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def check(self) -> None:
        """Raises InputError for an address that is not this machine's."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)[
                0
            ]
            with socket.socket(family, kind) as trial:
                trial.bind(address)
        except OSError as error:
            raise InputError(
                f"--listen {self.host}:{self.port}: it is no address of this machine "
                f"({error.strerror})"
            ) from error

    def url(self) -> str:
        """Without the password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis://{host}:{self.port}"


class StoreServer(DatabaseServer):
    """One store. `folder` is where its log is, its socket and, if it persists, its files.

    Raises InputError when others could reach it without a password, and EngineUnavailable when
    there is no engine and none can be made; `say` is told when one is. `inside` is a network
    namespace, for root.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "store",
        listen: Endpoint | None = None,
        password: str = "",
        persist: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        inside: str = "",
    ) -> None:
        if listen is not None and not is_loopback(listen.host) and not password:
            raise InputError(
                f"--listen {listen.host}:{listen.port}: others can reach this address, "
                "so the store needs a password: --password-file FILE"
            )
        if listen is not None and not inside:
            listen.check()
        folder = folder.absolute()
        log = folder / "logs" / f"{name}.log"
        _make_folder(log.parent, "--home")
        settings = {
            **_files(persist),
            "maxmemory-policy": "noeviction",
            "rdbcompression": "no",  # floats hardly shrink, and trying takes longer than writing
            "daemonize": "no",
            "logfile": quoted(log),
            "proto-max-bulk-len": str(LONGEST_ARGUMENT),
            "loadmodule": quoted(engine_path(say)),
        }
        if listen is not None:
            self.url = listen.url()
            settings |= {"bind": quoted(listen.host), "port": str(listen.port)}
            client = redis.Redis(listen.host, listen.port, password=password or None, **ASKING)
        else:
            file = f"{name}.sock"
            path = short_folder(folder, len(os.fsencode(file))) / file
            self.url = f"unix://{path}"
            settings |= {"port": "0", "unixsocket": quoted(path), "unixsocketperm": "700"}
            client = redis.Redis(unix_socket_path=str(path), password=password or None, **ASKING)
        if password:
            settings["requirepass"] = quoted(password)
        ip = shutil.which("ip")
        before = [ip, "netns", "exec", inside] if inside and ip is not None else []
        self._persist = persist
        inherited = []
        if persist is not None:
            try:
                self._lock = os.open(persist / "mayfly.lock", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise InputError(f"--persist {persist}: {error.strerror}") from error
            inherited = [self._lock]
        super().__init__(
            f"the store at {self.url}", settings, client, log, StoreUnavailable, before, inherited
        )

    def start(self, seconds: float = START_S) -> None:
        """As any server. Raises InputError when another store has the folder to persist in."""
        if self._persist is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--persist {self._persist}: another store is using it") from None
        super().start(seconds)

    def stop(self, seconds: float = 5.0) -> None:
        super().stop(seconds)
        if self._persist is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


def _make_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder}: {error.strerror}") from error


def _files(persist: Path | None) -> dict[str, str]:
    if persist is None:
        return {"save": '""', "appendonly": "no"}
    _make_folder(persist, "--persist")
    return {
        "dir": quoted(persist.absolute()),
        "save": '""',
        "appendonly": "yes",
        "appendfsync": "everysec",
    }
