"""Where the vectors of a collective lie."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Memory(Protocol):
    @property
    def is_shared(self) -> bool:
        """Whether others read where its vectors lie."""

    def take(self, length: int) -> Vector:
        """A vector of whatever values, of `length` elements."""

    def holds(self, step: int) -> bool:
        """Whether all that others lent for this step is still what it was."""

    def next_step(self, step: int) -> None:
        """The vectors of the steps before this one were let go of."""


class PlainMemory:
    """That of the process."""

    is_shared = False

    def take(self, length: int) -> Vector:
        return np.empty(length, np.float32)

    def holds(self, step: int) -> bool:
        return True

    def next_step(self, step: int) -> None:
        pass
