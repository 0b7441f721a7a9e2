"""A function's snapshot, as the emulator sees it: made at the beginning, forked for each start.

The snapshot is a process that has imported what the function needs (`snapshot_process.py`); a
sandbox's process is a child of it, so it starts in the time of a fork. Lambda's counterpart is
SnapStart. When the snapshot's process dies, its children die with it, and the next start makes it
anew; one that dies twice before it is ready fails that start, and with it the attempt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.emulator.functions import Function
from launcher.emulator.process import Launch, SandboxProcess, ending, environment, mark
from launcher.emulator.snapshot_process import MESSAGE_BYTES, ForkRequest, Report
from launcher.emulator.warden import end_marked

logger = logging.getLogger(__name__)

MAKING_SECONDS = 120.0
"""Until a snapshot is ready; importing torch takes two seconds, or ten where cores are few."""
FORK_SECONDS = 30.0
TRIES = 2
_PROGRAM = Path(__file__).with_name("snapshot_process.py")


class Snapshot:
    """One function's, made inside a running event loop; its process is `name`'s in /proc.

    `start` is a `process.Start`.
    """

    def __init__(self, function: Function, name: str, host: str, log_folder: Path) -> None:
        self._function = function
        self._name = name
        self._environment = environment(function, name, host)
        self._log_path = log_folder / f"{name}.log"
        self._server: ForkServer | None = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False
        self._failures = 0
        self._failure = ""
        self._first = asyncio.create_task(self._make_early())

    async def start(self, launch: Launch) -> SandboxProcess:
        """A process forked from the snapshot, which is waited for, and made anew if it died.

        Raises OSError when there can be none.
        """
        failures = self._failures
        async with self._one_at_a_time:
            if self._failures > failures:  # all that waited for it fail together
                raise OSError(self._failure)
            try:
                return await (await self._ready()).fork(launch)
            except ConnectionError:  # it died unnoticed, or just now
                return await (await self._ready()).fork(launch)

    async def close(self) -> None:
        """Ends the snapshot's process, and so its children; starts that wait for it fail."""
        self._closed = True
        if self._server is not None:
            self._server.kill()
        await self._first
        async with self._one_at_a_time:
            if self._server is not None:
                await self._server.gone

    # --- inside ------------------------------------------------------------------------------

    async def _make_early(self) -> None:
        async with self._one_at_a_time:
            try:
                await self._ready()
            except OSError as error:
                if not self._closed:  # the next start tries again, and says so if it fails
                    logger.warning("%s: %s", self._function.name, error)

    async def _ready(self) -> ForkServer:
        if self._server is not None and not self._server.is_dead:
            return self._server
        reason = ""
        for _ in range(TRIES):
            if self._server is not None:
                await self._server.gone
                # what it had started, or was just forking
                await asyncio.to_thread(end_marked, mark(self._name) + b"\0")
            if self._closed:
                raise OSError("the emulator is ending")
            self._server = await self._make()
            try:
                await self._server.await_ready()
                return self._server
            except ConnectionError as error:
                reason = str(error)
        self._failures += 1
        self._failure = f"no snapshot of {self._function.name}: {reason}; see {self._log_path}"
        raise OSError(self._failure)

    async def _make(self) -> ForkServer:
        """Raises OSError. On the main thread, as `process.start_cold`."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with there, self._log_path.open("ab", buffering=0) as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    str(_PROGRAM),
                    str(os.getpid()),
                    str(there.fileno()),
                    *self._function.preload,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._function.working_directory,
                    env=self._environment,
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            here.close()
            raise
        server = ForkServer(process, here)
        if self._closed:
            server.kill()
        return server


@dataclass(frozen=True)
class Forked:
    """A child of the snapshot (`process.SandboxProcess`)."""

    pid: int
    status: asyncio.Future[int]

    async def wait(self) -> int:
        return await asyncio.shield(self.status)


class ForkServer:
    """The snapshot's process and the connection to it. One request at a time."""

    def __init__(self, process: asyncio.subprocess.Process, connection: socket.socket) -> None:
        self._process = process
        self._connection = connection
        self._connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._read)
        self._answer: asyncio.Future[Report] = self._loop.create_future()
        self._newest: Forked | None = None
        self._children: dict[int, asyncio.Future[int]] = {}
        self._reason = ""
        self.gone = asyncio.create_task(self._watch())
        """Over when the process has ended and all is told to those who wait for it."""

    @property
    def is_dead(self) -> bool:
        return self.gone.done() or self._process.returncode is not None

    def kill(self, reason: str = "") -> None:
        self._reason = self._reason or reason
        with suppress(ProcessLookupError):
            self._process.kill()

    async def await_ready(self) -> None:
        """Raises ConnectionError if it dies instead."""
        report = await self._await_answer(MAKING_SECONDS)
        assert report.kind == "ready"

    async def fork(self, launch: Launch) -> Forked:
        """Raises ConnectionError if the snapshot dies, and OSError for what keeps a child away."""
        request = ForkRequest(
            launch.handler, launch.working_directory, dict(launch.environment)
        ).encode()
        if len(request) > MESSAGE_BYTES:
            raise OSError(f"the environment is larger than {MESSAGE_BYTES} bytes")
        self._answer = self._loop.create_future()
        try:
            socket.send_fds(self._connection, [request], [launch.log.fileno()])
        except ConnectionError:
            await self.gone
            raise
        report = await self._await_answer(FORK_SECONDS)
        if report.kind == "failed":
            raise OSError(report.reason)
        assert self._newest is not None and self._newest.pid == report.pid
        return self._newest  # which may be over by now, and no longer among the children

    # --- inside ------------------------------------------------------------------------------

    async def _await_answer(self, seconds: float) -> Report:
        patience = self._loop.call_later(
            seconds, self.kill, f"the snapshot's process did not answer for {seconds:.0f} s"
        )
        try:
            return await self._answer
        finally:
            patience.cancel()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                message = b""
            if not message:
                self._loop.remove_reader(self._connection)
                return
            report = Report.decode(message)
            if report.kind == "exited":
                self._exited(report.pid, report.status)
                continue
            if report.kind == "started":
                self._newest = Forked(report.pid, self._loop.create_future())
                self._children[report.pid] = self._newest.status
            if not self._answer.done():
                self._answer.set_result(report)

    def _exited(self, pid: int, status: int) -> None:
        child = self._children.pop(pid)
        if not child.done():
            child.set_result(status)

    async def _watch(self) -> None:
        status = await self._process.wait()
        self._read()  # what it still said
        self._loop.remove_reader(self._connection)
        self._connection.close()
        for pid in list(self._children):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # as the kernel does
            self._exited(pid, -signal.SIGKILL)
        if not self._answer.done():
            reason = self._reason or f"the snapshot's process has ended: {ending(status)}"
            self._answer.set_exception(ConnectionError(reason))
            self._answer.exception()  # perhaps nobody asks
