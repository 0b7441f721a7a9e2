"""The steps a peer finished lately, for the run's history: one member tells them for all.

Every member keeps its last few seconds, so when the teller dies, the next one tells what may not
have been told. Readers take the first word on each step.
"""

from __future__ import annotations

import threading
from collections import deque

KEPT_SECONDS = 3.0
ROWS_LIMIT = 20_000

Row = tuple[int, float, float]
"""(step that was reached, time in the registry's seconds, loss of the step before it)"""


class Journal:
    """Written by the computing thread, told by the registry's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: deque[Row] = deque(maxlen=ROWS_LIMIT)
        self._told = -1

    def add(self, step: int, time: float, loss: float) -> None:
        with self._lock:
            self._rows.append((step, time, loss))

    def untold(self, teller: bool) -> list[Row]:
        """What the teller should tell now; others forget what is old."""
        with self._lock:
            if teller:
                return [row for row in self._rows if row[0] > self._told]
            if self._rows:
                newest = self._rows[-1][1]
                while self._rows and self._rows[0][1] < newest - KEPT_SECONDS:
                    self._rows.popleft()
            return []

    def told(self, rows: list[Row]) -> None:
        with self._lock:
            self._told = max(self._told, rows[-1][0])
            while self._rows and self._rows[0][0] <= self._told:
                self._rows.popleft()
