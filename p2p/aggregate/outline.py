"""A state's image without the bytes that a store has: all that goes from peer to peer of it.

An image is a run of pieces. Those that lie in the model's memory or are the optimizer's vectors are
in the store, so the outline says under which key; the rest (counts of steps, the scheduler) it
carries. Its form is msgpack: [MAGIC, step, slot, place, pieces], a piece being its bytes or
[key, start, stop]. `slot` is that of the peer whose store had it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

MAGIC = "mayfly outline"
BEGINNING = b"\x95" + msgpack.packb(MAGIC)
"""Of a list of five that starts with the magic word."""


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
class Stored:
    """A piece that a store has: these bytes of the tensor under the key."""

    key: str
    start: int
    stop: int


Piece = bytes | Stored


@dataclass(frozen=True, slots=True)
class Outline:
    step: int
    slot: int
    place: str
    pieces: tuple[Piece, ...]

    def to_bytes(self) -> bytes:
        pieces = [each if isinstance(each, bytes) else astuple(each) for each in self.pieces]
        packed: bytes = msgpack.packb([MAGIC, self.step, self.slot, self.place, pieces])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Outline | None:
        """None for what is none, such as a whole image. Raises ValueError for a damaged one."""
        if bytes(data[: len(BEGINNING)]) != BEGINNING:
            return None
        try:
            _, step, slot, place, pieces = msgpack.unpackb(data)
            return cls(int(step), int(slot), str(place), tuple([_piece(each) for each in pieces]))
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"a damaged outline: {error}") from None

    def image(self, pull: Callable[[str], npt.NDArray[Any]]) -> bytearray:
        """The whole image, whose digest tells if it is right: an outline may come damaged.

        `pull(key)` gets a tensor from the store, and may raise.
        """
        last = {piece.key: n for n, piece in enumerate(self.pieces) if isinstance(piece, Stored)}
        pulled: dict[str, memoryview] = {}
        image = bytearray()
        for number, piece in enumerate(self.pieces):
            if isinstance(piece, bytes):
                image += piece
                continue
            if piece.key not in pulled:
                pulled[piece.key] = pull(piece.key).reshape(-1).view(np.uint8).data
            image += pulled[piece.key][piece.start : piece.stop]
            if last[piece.key] == number:
                del pulled[piece.key]
        return image


def _piece(found: Any) -> Piece:
    if isinstance(found, bytes):
        return found
    key, start, stop = found
    return Stored(str(key), int(start), int(stop))


def cut(pieces: Iterable[bytes | memoryview], stored: Sequence[Memory]) -> tuple[Piece, ...]:
    """The pieces of an outline: of an image's, what lies in stored memory becomes its key."""
    found: list[Piece] = []
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
            found.append(Stored(memory.key, first, first + stop - start))
            raw, at = raw[stop - at :], stop
        if len(raw):
            found.append(raw.tobytes())
    return tuple(found)
