"""A state's image without the bytes that a store has: all that goes from peer to peer of it.

An image is a run of pieces. Those that lie in the model's memory or are the optimizer's vectors are
in the store, so the outline says under which key; the rest (counts of steps, the scheduler) it
carries. Its form is msgpack: [MAGIC, step, slot, place, pieces], a piece being its bytes or
[key, first byte, last byte + 1]. `slot` is that of the peer whose store had it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

MAGIC = "mayfly outline"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of this process, from `address` on, and where a store has the same."""

    address: int
    length: int
    key: str
    start: int = 0
    """Of the tensor under the key, in bytes."""

    @classmethod
    def of(cls, array: npt.NDArray[Any], key: str, start: int = 0) -> Memory:
        return cls(array.ctypes.data, array.nbytes, key, start)


@dataclass(frozen=True, slots=True)
class Outline:
    step: int
    slot: int
    place: str
    pieces: tuple[Any, ...]

    def to_bytes(self) -> bytes:
        packed: bytes = msgpack.packb([MAGIC, self.step, self.slot, self.place, self.pieces])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Outline | None:
        """None for what is no outline, such as a whole image."""
        try:
            magic, step, slot, place, pieces = msgpack.unpackb(data)
        except (ValueError, TypeError, msgpack.UnpackException):
            return None
        return cls(step, slot, place, tuple(pieces)) if magic == MAGIC else None

    def image(self, pull: Callable[[str], npt.NDArray[Any]]) -> bytearray:
        """The whole image, whose digest tells if it is right: an outline may come damaged.

        `pull(key)` gets a tensor from the store, and may raise. Raises ValueError and TypeError for
        pieces that are none.
        """
        pulled: dict[str, memoryview] = {}
        image = bytearray()
        for piece in self.pieces:
            if isinstance(piece, bytes):
                image += piece
                continue
            key, start, stop = piece
            if key not in pulled:
                pulled[key] = pull(key).reshape(-1).view(np.uint8).data
            image += pulled[key][start:stop]
        return image


def cut(pieces: Iterable[bytes | memoryview], stored: Sequence[Memory]) -> tuple[Any, ...]:
    """The pieces of an outline: of an image's, what lies in stored memory becomes its key."""
    found: list[Any] = []
    memories = sorted(filter(lambda memory: memory.length, stored), key=attrgetter("address"))
    addresses = [memory.address for memory in memories]
    for piece in pieces:
        raw = np.frombuffer(piece, np.uint8)
        at, end = raw.ctypes.data, raw.ctypes.data + len(raw)
        for memory in memories[max(0, bisect_right(addresses, at) - 1) :]:
            start, stop = max(at, memory.address), min(end, memory.address + memory.length)
            if memory.address >= end:
                break
            if start >= stop:
                continue
            if at < start:
                found.append(raw[: start - at].tobytes())
            first = memory.start + start - memory.address
            found.append([memory.key, first, first + stop - start])
            raw, at = raw[stop - at :], stop
        if len(raw):
            found.append(raw.tobytes())
    return tuple(found)
