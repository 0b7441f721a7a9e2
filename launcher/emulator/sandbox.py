"""One sandbox: a function's process from its start to its end, and the event it has in hand.

Holds the limits (time, memory, initialisation, idleness) and decides how each attempt ended. The
Runtime API calls `next`, `respond`, `fail` and `fail_init` on the process's behalf. Which event
goes to which sandbox, and whether it is tried again, is the pool's business.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from launcher.emulator.functions import Function
from launcher.emulator.invocation import Cause, Invocation, Outcome, StartKind, failure
from launcher.emulator.process import (
    Launch,
    PeakMemory,
    SandboxProcess,
    Start,
    ending,
    environment,
    mark,
)
from launcher.emulator.warden import end_marked

MEMORY_LOOK_S = 0.05


class Misuse(Exception):
    """The process called the Runtime API out of turn."""


class Owner(Protocol):
    """Whom a sandbox reports to."""

    def ended(self, sandbox: Sandbox, invocation: Invocation, outcome: Outcome) -> None: ...

    def available(self, sandbox: Sandbox) -> None: ...

    def gone(self, sandbox: Sandbox, untouched: Invocation | None) -> None:
        """The process has ended; `untouched` is an event that it never got to see."""
        ...


class Sandbox:
    """Made for its first invocation; `run` is its whole life."""

    def __init__(
        self,
        name: str,
        function: Function,
        invocation: Invocation,
        owner: Owner,
        start: Start,
        host: str,
        log_folder: Path,
    ) -> None:
        self.name = name
        self.function = function
        self.invocation: Invocation | None = invocation
        self.start_kind: StartKind = "restored" if function.start == "snapshot" else "cold"
        self.started_at = time.time()
        self.deadline: float | None = None
        """Of the event in hand, in seconds since 1970."""
        self._owner = owner
        self._start = start
        self._host = host
        self._log_path = log_folder / f"{name}.log"
        self._log: IO[bytes] | None = None
        self._process: SandboxProcess | None = None
        self._initialised = False
        self._fetched = False
        self._polling = False
        self._over = False
        self._sentence: tuple[Cause, str, str] | None = None
        """The limit that the process exceeded: cause, type of error, reason."""
        self._killed = False
        self._init_error: bytes | None = None
        self._given = asyncio.Event()
        self._given.set()
        self._limit: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._memory: PeakMemory | None = None

    # --- what the pool and the control API see ----------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def state(self) -> Literal["starting", "idle", "busy"]:
        if not self._initialised:
            return "starting"
        return "busy" if self.invocation is not None else "idle"

    @property
    def is_available(self) -> bool:
        return self.state == "idle" and not self._killed and not self._over

    @property
    def is_ending(self) -> bool:
        """No event will reach it any more, though its process may still be there."""
        return self._killed

    def give(self, invocation: Invocation) -> None:
        """The next event, for an available sandbox."""
        assert self.is_available
        self._set_limit(None)
        self.invocation = invocation
        self.start_kind = "warm"
        self._fetched = False
        self._given.set()

    def kill(self) -> None:
        """SIGKILL to the process and its group; `run` sees to the rest."""
        self._killed = True
        if self._process is not None and not self._over:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def run(self) -> None:
        """Starts the process and stays until it, and all that it started, is gone."""
        try:
            status = await self._live()
        except OSError as error:
            self._sentence = ("init", "Runtime.StartError", f"the process cannot start: {error}")
            status = None
        self._end(status)
        await asyncio.to_thread(end_marked, mark(self.name) + b"\0")

    # --- the process's calls -----------------------------------------------------------------

    async def next(self) -> Invocation:
        """Waits for an event and hands it over. Raises Misuse out of turn, or after the end."""
        if self._killed:
            raise Misuse("the sandbox has ended")
        if self._polling or self._fetched:
            raise Misuse("an event is in hand, or has been asked for")
        if not self._initialised:
            self._initialised = True
            self._set_limit(None)
        self._polling = True
        try:
            await self._given.wait()
        finally:
            self._polling = False
        if self._killed or self.invocation is None:
            raise Misuse("the sandbox has ended")
        self._given.clear()
        self._fetched = True
        self._began = time.monotonic()
        self.deadline = time.time() + self.function.timeout_s
        self._set_limit(self.function.timeout_s)
        self._write_log(f"START RequestId: {self.invocation.request_id} Version: $LATEST")
        return self.invocation

    def respond(self, request_id: str, body: bytes) -> None:
        """The handler returned. Raises Misuse for any request but the one in hand."""
        self._finish(request_id, "ok", body)

    def fail(self, request_id: str, body: bytes) -> None:
        """The handler raised. The process lives on."""
        self._finish(request_id, "error", body)

    def fail_init(self, body: bytes) -> None:
        """The handler could not be imported; the process is about to end."""
        if self._initialised:
            raise Misuse("initialisation is over")
        self._init_error = body

    # --- inside ------------------------------------------------------------------------------

    async def _live(self) -> int:
        self._log = self._log_path.open("ab", buffering=0)
        self._process = await self._start(
            Launch(
                self.function.handler,
                self.function.working_directory,
                environment(self.function, self.name, self._host),
                self._log,
            )
        )
        if self._killed:
            self.kill()
        if not self._initialised:
            self._set_limit(self.function.init_timeout_s)
        self._memory = PeakMemory(self._process.pid)
        watching = asyncio.create_task(self._watch(self._memory))
        try:
            return await self._process.wait()
        finally:
            watching.cancel()

    async def _watch(self, memory: PeakMemory) -> None:
        limit, loop = self.function.memory_mb << 20, asyncio.get_running_loop()
        while True:
            if memory.read() > limit and not self._killed:
                self._condemn(
                    "out of memory",
                    "Runtime.OutOfMemory",
                    f"the function used more than its {self.function.memory_mb} MB of memory",
                )
            # to the next multiple, so that the loop wakes once for all sandboxes
            await asyncio.sleep(MEMORY_LOOK_S - loop.time() % MEMORY_LOOK_S)

    def _set_limit(self, seconds: float | None) -> None:
        if self._limit is not None:
            self._limit.cancel()
        loop = asyncio.get_running_loop()
        self._limit = loop.call_later(seconds, self._exceeded) if seconds is not None else None

    def _exceeded(self) -> None:
        if self._killed:
            return
        if not self._initialised:
            limit = self.function.init_timeout_s
            self._condemn("init", "Sandbox.Timedout", f"no start within {limit:.2f} seconds")
        elif self._fetched:
            limit = self.function.timeout_s
            self._condemn(
                "timeout", "Sandbox.Timedout", f"Task timed out after {limit:.2f} seconds"
            )
        else:
            self.kill()  # idle for too long

    def _condemn(self, cause: Cause, kind: str, reason: str) -> None:
        self._sentence = (cause, kind, reason)
        self.kill()

    def _finish(self, request_id: str, cause: Cause, body: bytes) -> None:
        invocation = self.invocation
        if not self._fetched or invocation is None or invocation.request_id != request_id:
            raise Misuse(f"request {request_id} is not in hand")
        if self._killed:
            return  # too late: the end of the process decides
        self._fetched = False
        self.invocation = None
        self.deadline = None
        self._write_report(request_id)
        if self.function.start == "cold":
            self.kill()
            self._owner.ended(self, invocation, Outcome(cause, body))
            return
        self._set_limit(self.function.idle_timeout_s)
        self._owner.ended(self, invocation, Outcome(cause, body))
        self._owner.available(self)

    def _end(self, status: int | None) -> None:
        self._killed = True
        if self._process is not None:
            with suppress(ProcessLookupError):  # what it left in its group
                os.killpg(self._process.pid, signal.SIGKILL)
        self._over = True
        self._set_limit(None)
        invocation = self.invocation
        untouched = invocation if self._initialised and not self._fetched else None
        if invocation is not None and untouched is None:
            outcome = self._verdict(invocation.request_id, status)
            if self._fetched:
                self._write_report(invocation.request_id)
            self._owner.ended(self, invocation, outcome)
        self.invocation = None
        self._given.set()  # whoever still polls learns that it is over
        if self._log is not None:
            self._log.close()
        if self._memory is not None:
            self._memory.close()
        self._owner.gone(self, untouched)

    def _verdict(self, request_id: str, status: int | None) -> Outcome:
        if self._sentence is not None:
            cause, kind, reason = self._sentence
            return failure(cause, kind, request_id, reason, status)
        if self._init_error is not None:
            return Outcome("init", self._init_error, status)
        assert status is not None
        reason = f"Runtime exited with error: {ending(status)}"
        cause = "crash" if self._initialised else "init"
        return failure(cause, "Runtime.ExitError", request_id, reason, status)

    def _write_report(self, request_id: str) -> None:
        peak_bytes = self._memory.read() if self._memory is not None else 0
        duration_ms = (time.monotonic() - self._began) * 1000
        self._write_log(f"END RequestId: {request_id}")
        self._write_log(
            f"REPORT RequestId: {request_id}\tDuration: {duration_ms:.2f} ms\t"
            f"Memory Size: {self.function.memory_mb} MB\t"
            f"Max Memory Used: {peak_bytes >> 20} MB\tStart: {self.start_kind}"
        )

    def _write_log(self, line: str) -> None:
        # a full disk costs lines of the log, never an event
        with suppress(OSError):
            if self._log is not None and not self._log.closed:
                self._log.write(f"{line}\n".encode())


def describe(sandbox: Sandbox) -> dict[str, Any]:
    """A sandbox as the control API tells it."""
    invocation = sandbox.invocation
    return {
        "sandbox": sandbox.name,
        "function": sandbox.function.name,
        "pid": sandbox.pid,
        "state": sandbox.state,
        "request_id": invocation.request_id if invocation is not None else None,
        "event": invocation.event if invocation is not None else None,
        "start": sandbox.start_kind,
        "started_at": sandbox.started_at,
        "deadline": sandbox.deadline,
    }
