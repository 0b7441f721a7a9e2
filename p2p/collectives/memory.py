"""Where the vectors of a collective lie."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


class Memory(Protocol):
    def take(self, length: int) -> Vector:
        """A vector of whatever values, of `length` elements."""

    def next_step(self) -> None:
        """The vectors of the step before were let go of."""


class PlainMemory:
    """That of the process."""

    def take(self, length: int) -> Vector:
        return np.empty(length, np.float32)

    def next_step(self) -> None:
        pass
