"""A function's sandboxes and the events that wait for one: placing, throttling, trying again.

Asynchronous events are delivered at least once. An attempt that fails, for whatever reason, is
followed by as many more as the function's configuration says; an event whose sandbox died before
it saw it costs no attempt. A synchronous call is tried once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.emulator.functions import Function
from launcher.emulator.invocation import Ended, History, Invocation, Outcome
from launcher.emulator.process import Start
from launcher.emulator.sandbox import Sandbox

logger = logging.getLogger(__name__)


class Throttled(Exception):
    """No sandbox is free and no more may be made, too many events wait, or the end has come."""


class Pool:
    """Everything about one function that changes. Its sandboxes take their ids from `names`."""

    def __init__(
        self,
        function: Function,
        names: Iterator[str],
        host: str,
        log_folder: Path,
        history: History,
        start: Start,
    ) -> None:
        self.function = function
        self.sandboxes: dict[str, Sandbox] = {}
        self._names = names
        self._host = host
        self._log_folder = log_folder
        self._history = history
        self._start = start
        self._waiting: deque[Invocation] = deque()
        self._idle: list[Sandbox] = []
        """The most recently used last: that one goes first, so that the others may expire."""
        self._retries: set[asyncio.TimerHandle] = set()
        self._lives: set[asyncio.Task[None]] = set()
        self._closed = False

    def submit(self, invocation: Invocation) -> None:
        """Takes an event. Raises Throttled; then nothing of it remains."""
        if self._closed:
            raise Throttled("the emulator is ending")
        if invocation.reply is None:
            if len(self._waiting) + len(self._retries) >= self.function.queue_limit:
                raise Throttled(f"{self.function.queue_limit} events are waiting")
        elif not self._idle and self._claimed() >= self.function.concurrency:
            raise Throttled(f"{self.function.concurrency} sandboxes are busy")
        self._waiting.append(invocation)
        self._place()

    async def close(self) -> None:
        """Drops the events, kills the sandboxes and waits for their end."""
        self._closed = True
        for invocation in self._waiting:
            if invocation.reply is not None:
                invocation.reply.cancel()
        self._waiting.clear()
        for retry in self._retries:
            retry.cancel()
        for sandbox in list(self.sandboxes.values()):
            sandbox.kill()
        if self._lives:
            await asyncio.wait(self._lives)

    # --- what sandboxes report (sandbox.Owner) ----------------------------------------------

    def ended(self, sandbox: Sandbox, invocation: Invocation, outcome: Outcome) -> None:
        self._history.add(
            Ended(
                index=self._history.next_index,
                function=self.function.name,
                sandbox=sandbox.name,
                pid=sandbox.pid,
                request_id=invocation.request_id,
                attempt=invocation.attempt,
                event=invocation.event,
                start=sandbox.start_kind,
                cause=outcome.cause,
                exit=outcome.exit,
                detail=outcome.detail,
                ended_at=time.time(),
            )
        )
        if outcome.cause != "ok":
            reason = outcome.body[:200].decode("utf-8", "replace")
            logger.info("%s: %s in %s: %s", self.function.name, outcome.cause, sandbox.name, reason)
        if invocation.reply is not None:
            if not invocation.reply.done():
                invocation.reply.set_result(outcome)
        elif outcome.cause != "ok" and not self._closed:
            self._try_again(invocation)

    def available(self, sandbox: Sandbox) -> None:
        self._idle.append(sandbox)
        self._place()

    def gone(self, sandbox: Sandbox, untouched: Invocation | None) -> None:
        del self.sandboxes[sandbox.name]
        if sandbox in self._idle:
            self._idle.remove(sandbox)
        if untouched is not None:
            self._waiting.appendleft(untouched)
        self._place()

    # --- inside ------------------------------------------------------------------------------

    def _claimed(self) -> int:
        """Places taken. One whose sandbox is ending is free, but whoever waits comes before."""
        ending = sum(sandbox.is_ending for sandbox in self.sandboxes.values())
        return len(self.sandboxes) - ending + len(self._waiting)

    def _place(self) -> None:
        while self._waiting and not self._closed:
            sandbox = self._take_idle()
            if sandbox is not None:
                sandbox.give(self._waiting.popleft())
            elif len(self.sandboxes) < self.function.concurrency:
                self._begin(self._waiting.popleft())
            else:
                return

    def _take_idle(self) -> Sandbox | None:
        while self._idle:
            sandbox = self._idle.pop()
            if sandbox.is_available:
                return sandbox
        return None

    def _begin(self, invocation: Invocation) -> None:
        sandbox = Sandbox(
            next(self._names),
            self.function,
            invocation,
            self,
            self._start,
            self._host,
            self._log_folder,
        )
        self.sandboxes[sandbox.name] = sandbox
        life = asyncio.create_task(sandbox.run())
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    def _try_again(self, invocation: Invocation) -> None:
        delays = self.function.retry_delays_s
        if invocation.attempt > len(delays):
            logger.warning(
                "%s: request %s is given up after %d attempts",
                self.function.name,
                invocation.request_id,
                invocation.attempt,
            )
            return
        again = replace(invocation, attempt=invocation.attempt + 1)

        def due() -> None:
            self._retries.discard(retry)
            self._waiting.append(again)
            self._place()

        retry = asyncio.get_running_loop().call_later(delays[invocation.attempt - 1], due)
        self._retries.add(retry)
