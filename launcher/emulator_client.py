"""The emulator's control API, as the supervisor and the fault injectors use it."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from fault.errors import PlatformUnavailable

WAIT_S = 10.0
"""For news, in one request,"""
LISTEN_AGAIN_S = 0.25
"""and so long after one that brought none."""
# no proxy leads to loopback
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EmulatorClient:
    """`endpoint` is http://host:port on loopback. Every call raises PlatformUnavailable."""

    def __init__(self, endpoint: str, timeout_s: float = 3.0) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s

    def sandboxes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("/mayfly/sandboxes")
        return found

    def ended(self, after: int, wait_s: float) -> list[dict[str, Any]]:
        """The invocations that ended since the one with this index.

        If there are none, waits for one up to `wait_s`, which the client's own timeout must exceed.
        """
        found: list[dict[str, Any]] = self._call(f"/mayfly/ended?after={after}&wait={wait_s}")
        return found

    def kill(self, slot: int) -> None:
        """SIGKILL for whatever runs in this slot."""
        self._call("/mayfly/kill", {"slot": slot})

    def call(self, function: str, event: dict[str, Any]) -> dict[str, Any]:
        """What the function returns, within the client's own timeout. Raises also if it fails."""
        path = f"/2015-03-31/functions/{function}/invocations"
        found: dict[str, Any] = self._call(path, event)
        return found

    def duplicate(self, which: str) -> None:
        """Delivers the "next" or the "last" asynchronous event twice."""
        self._call("/mayfly/duplicate", {"event": which})

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.endpoint + path, data, {"Content-Type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=self._timeout_s) as answer:
                found = json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise PlatformUnavailable(f"the emulator at {self.endpoint}: {error}") from error
        if "X-Amz-Function-Error" in answer.headers:
            raise PlatformUnavailable(f"the function failed: {found.get('errorMessage')}")
        return found


class Listener:
    """Hears of the invocations that end at one emulator, as soon as they do, in its own thread.

    A new emulator counts them from the start, so it needs a new listener.
    """

    def __init__(self, endpoint: str) -> None:
        self._emulator = EmulatorClient(endpoint, timeout_s=2 * WAIT_S)
        self._heard: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def heard(self) -> list[dict[str, Any]]:
        """Those that ended since the last call."""
        found = []
        with suppress(Empty):
            while True:
                found.append(self._heard.get_nowait())
        return found

    def close(self) -> None:
        self._closed.set()

    def _listen(self) -> None:
        last = 0
        while not self._closed.is_set():
            ended = []
            with suppress(PlatformUnavailable):  # it is ending, or being restarted
                ended = self._emulator.ended(last, WAIT_S)
            for each in ended:
                self._heard.put(each)
                last = each["index"]
            if not ended:
                self._closed.wait(LISTEN_AGAIN_S)
