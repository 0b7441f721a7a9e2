"""When the same may be sent again. Sans-I/O."""

from __future__ import annotations

from collections.abc import Hashable


class Again:
    """What was sent again is sent once more after a while, and each time that is twice as long.

    Whoever asks does not see what is on its way through others, and each copy makes that longer.
    """

    def __init__(self, first_s: float, limit_s: float) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._due: dict[Hashable, tuple[float, float]] = {}
        """Of what was sent: from when on it may be sent again, and how long it had to wait."""

    def clear(self) -> None:
        self._due.clear()

    def allows(self, key: Hashable, now: float) -> bool:
        due = self._due.get(key)
        return due is None or now >= due[0]

    def sent(self, key: Hashable, now: float) -> None:
        due = self._due.get(key)
        wait_s = self._first_s if due is None else min(2 * due[1], self._limit_s)
        self._due[key] = (now + wait_s, wait_s)
