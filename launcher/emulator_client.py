"""The emulator's control API, as the supervisor and the fault injectors use it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from fault.errors import PlatformUnavailable

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

    def ended(self, after: int) -> list[dict[str, Any]]:
        """The invocations that ended since the one with this index."""
        found: list[dict[str, Any]] = self._call(f"/mayfly/ended?after={after}")
        return found

    def kill(self, slot: int) -> None:
        """SIGKILL for whatever runs in this slot."""
        self._call("/mayfly/kill", {"slot": slot})

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
                return json.loads(answer.read())
        except (OSError, ValueError) as error:
            raise PlatformUnavailable(f"the emulator at {self.endpoint}: {error}") from error
