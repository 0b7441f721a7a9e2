"""Starting a sandbox's process and looking at its memory: the seam to the operating system.

A kind of start is a function from a `Launch` to a `SandboxProcess`: here `start_cold`, a fresh
interpreter; the other is `Snapshot.start` (`snapshot.py`). What a process is for, and when it must
die, is `sandbox.py`'s.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from launcher.emulator.functions import Function

REGION = "us-east-1"
ACCOUNT = "000000000000"
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
"""All that a function sees of the emulator's own environment; the rest it must be given."""
_STATUS_BYTES = 1 << 16
"""More than /proc/PID/status has, also of a user in thousands of groups, which it lists."""
_PROGRAM = Path(__file__).with_name("function_process.py")


@dataclass(frozen=True)
class Launch:
    """All that a new process needs."""

    handler: str
    working_directory: str
    environment: Mapping[str, str]
    log: IO[bytes]
    """Where stdout and stderr go; the caller keeps it open until the start is over."""


class SandboxProcess(Protocol):
    """A process that leads a session and process group of its own."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """The exit status, negative for a signal, when the process has ended."""
        ...


Start = Callable[[Launch], Awaitable[SandboxProcess]]


async def start_cold(launch: Launch) -> SandboxProcess:
    """A fresh interpreter under AWS's runtime client. Raises OSError when there can be none.

    Call it on the main thread: the kernel ties a child's life to the thread that made it.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # this package's folder is no place for the function to import from
        str(_PROGRAM),
        str(os.getpid()),
        launch.handler,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=launch.log,
        stderr=launch.log,
        cwd=launch.working_directory,
        env=launch.environment,
        start_new_session=True,
    )


def environment(function: Function, sandbox: str, host: str) -> dict[str, str]:
    """What Lambda would set, and where to find this emulator at `host` (address:port).

    The name of the log stream is the one thing that tells a function its sandbox, here and on
    AWS; here it ends with the sandbox's id, and marks the process and its children (`mark`).
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **inherited,
        "TZ": ":UTC",
        # boto3 in the function finds the emulator by this; on AWS it is unset
        "AWS_ENDPOINT_URL_LAMBDA": f"http://{host}",
        **function.environment,
        "AWS_LAMBDA_RUNTIME_API": f"{host}/{sandbox}",
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory_mb),
        "AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start"
        if function.start == "snapshot"
        else "on-demand",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{function.name}",
        "AWS_LAMBDA_LOG_STREAM_NAME": os.fsdecode(mark(sandbox)),
        "AWS_EXECUTION_ENV": f"AWS_Lambda_python{sys.version_info[0]}.{sys.version_info[1]}",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "emulator",
        "AWS_SECRET_ACCESS_KEY": "emulator",
        "AWS_SESSION_TOKEN": "emulator",
        "LAMBDA_TASK_ROOT": function.working_directory,
        "LAMBDA_RUNTIME_DIR": function.working_directory,
        "_HANDLER": function.handler,
    }


def mark(sandbox: str) -> bytes:
    """What the environment of a sandbox's processes contains; also of a prefix of its id."""
    return b"mayfly/[$LATEST]" + sandbox.encode()


def ending(status: int) -> str:
    """How a process ended, in Lambda's words."""
    if status >= 0:
        return f"exit status {status}"
    return f"signal: {(signal.strsignal(-status) or str(-status)).lower()}"


class PeakMemory:
    """The most that a process ever had resident. Held open, its number cannot become another's."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: IO[bytes] | None = None
        self._bytes = 0

    def read(self) -> int:
        """In bytes; once the process has ended, the last that was read before, or 0."""
        try:
            if self._status is None:
                file = Path(f"/proc/{self._pid}/status")
                self._status = file.open("rb", buffering=0)
            status = os.pread(self._status.fileno(), _STATUS_BYTES, 0)
        except OSError:  # it is gone, this is not Linux, or too much is open now
            return self._bytes
        # ended and not yet waited for, it has a status without memory
        _, found, rest = status.partition(b"VmHWM:")
        if found:
            self._bytes = max(self._bytes, int(rest.split(maxsplit=1)[0]) * 1024)
        return self._bytes

    def close(self) -> None:
        """Once the process has ended: what `read` says stays."""
        if self._status is not None:
            self._status.close()
        self._status, self._pid = None, 0  # which no process has
