"""Plain data: an event on its way through the emulator, how an attempt at it ended, and the past.

Nothing here starts or ends a process; `pool.py` and `sandbox.py` do, and make these records.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

Cause = Literal["ok", "error", "timeout", "out of memory", "crash", "init"]
StartKind = Literal["cold", "warm", "restored"]

HISTORY_LIMIT = 1000


@dataclass
class Invocation:
    """One event for a function. All attempts at it, and doubles of it, share the request id."""

    request_id: str
    payload: bytes
    reply: asyncio.Future[Outcome] | None = None
    """Where a synchronous caller waits; None makes the event an asynchronous one."""
    attempt: int = 1

    @property
    def event(self) -> Any:
        return json.loads(self.payload)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    cause: Cause
    body: bytes
    """The handler's result, or the error as a JSON object, as a synchronous caller gets it."""
    exit: int | None = None
    """The status of the process if it ended, negative for a signal; None if it lives on."""

    @property
    def detail(self) -> Any:
        """The error as Lambda words it (errorMessage, errorType, perhaps stackTrace), or None."""
        if self.cause == "ok":
            return None
        try:
            return json.loads(self.body)
        except ValueError:
            return {"errorMessage": self.body.decode("utf-8", "replace")}


def failure(
    cause: Cause, kind: str, request_id: str, reason: str, exit: int | None = None
) -> Outcome:
    """An ending in which the function had no say, in Lambda's words."""
    message = f"RequestId: {request_id} Error: {reason}"
    body = json.dumps({"errorType": kind, "errorMessage": message})
    return Outcome(cause, body.encode(), exit)


@dataclass(frozen=True)
class Ended:
    """An attempt that is over, as the control API tells it."""

    index: int
    function: str
    sandbox: str
    pid: int
    request_id: str
    attempt: int
    event: Any
    start: StartKind
    cause: Cause
    exit: int | None
    detail: Any
    ended_at: float


class History:
    """The last attempts that ended, numbered from 1."""

    def __init__(self) -> None:
        self._records: deque[Ended] = deque(maxlen=HISTORY_LIMIT)
        self._count = 0
        self._grown = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Nobody waits from here on."""
        self._closed = True
        self._grown.set()

    @property
    def next_index(self) -> int:
        return self._count + 1

    def add(self, record: Ended) -> None:
        assert record.index == self.next_index
        self._count += 1
        self._records.append(record)
        self._grown.set()
        self._grown = asyncio.Event()

    async def after(self, index: int, wait_s: float) -> list[dict[str, Any]]:
        """The records above `index`; if there are none, waits for one up to `wait_s` seconds."""
        if self._count <= index and not self._closed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._grown.wait(), wait_s)
        return [asdict(record) for record in self._records if record.index > index]
