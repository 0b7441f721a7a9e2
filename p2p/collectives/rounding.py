"""The arithmetic of compression: bf16, and int8 with a scale for each block.

Each element is rounded up or down by chance, so that it is right on average. `noise` chooses where
in a fixed permutation of all 16-bit numbers the chances begin.

All is elementwise and exact but for that one rounding: scales are powers of two, so the bits depend
neither on the number of threads nor on whether a processor fuses a product and a sum.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2p.collectives.memory import Bytes, Vector

try:
    from p2p.collectives import _int8
except ImportError:  # there was no C compiler when it was installed
    _int8 = None  # type: ignore[assignment]

NOISE_PERIOD = 1 << 16
BLOCK = 256
"""Elements with one scale."""
ONE_SQUARED = 254
"""Two scales' exponents, as they are stored, add up to this if the product of the scales is 1."""
NOT_FINITE = 255
"""In place of a scale: something in the block is infinite or no number."""

_PERMUTATION = np.random.default_rng(0).permutation(NOISE_PERIOD)
_CENTERED = ((_PERMUTATION + 0.5) / NOISE_PERIOD - 0.5).astype(np.float32)
"""In the middle of its step, and around zero: rounding to the nearest does the rest."""
_MANTISSA_BITS = 23
_INFINITY_BITS = 0x7F800000
_UP_FROM_127_64THS = 0x800000 - 0x7E0001
"""Added to a float32's bits, it makes a mantissa of more than 127/64 one of the next exponent."""
_SCALE_OF = np.append(
    (np.arange(NOT_FINITE, dtype=np.int32) << _MANTISSA_BITS).view(np.float32), np.float32(np.nan)
)
N = TypeVar("N", np.float32, np.uint32)


class _Repeated(Generic[N]):
    """The permutation in some form, again and again, for as long as is wanted."""

    def __init__(self, period: npt.NDArray[N]) -> None:
        self._period: npt.NDArray[N] = period
        self._values: npt.NDArray[N] = np.resize(period, 2 * NOISE_PERIOD)

    def take(self, noise: int, length: int) -> npt.NDArray[N]:
        start = noise % NOISE_PERIOD
        if start + length > len(self._values):
            self._values = np.resize(self._period, NOISE_PERIOD + length)
        return self._values[start : start + length]


class _Room:
    """For what is computed in between."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.float32)

    def take(self, length: int) -> Vector:
        if len(self._room) < length:
            self._room = np.empty(length, np.float32)
        return self._room[:length]


class Bf16:
    """The upper half of each float32: 8 bits of precision, and the whole range."""

    times = 2

    def __init__(self) -> None:
        self._noise = _Repeated(_PERMUTATION.astype(np.uint32))
        self._room = _Room()

    def size(self, elements: int) -> int:
        return 2 * elements

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        # what is added to the lower half carries into the upper one as often as it should
        sums = self._room.take(len(values)).view(np.uint32)
        np.add(values.view(np.uint32), self._noise.take(noise, len(values)), out=sums)
        np.right_shift(sums, 16, out=sums)
        np.copyto(out.view(np.uint16), sums, casting="unsafe")
        odd = np.isnan(values)
        if odd.any():  # a carry could make it an infinity, or a zero
            out.view(np.uint16)[odd] = 0x7FC0

    def unpack(self, payload: Bytes, out: Vector) -> None:
        np.left_shift(payload.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)

    def add(self, payload: Bytes, to: Vector) -> None:
        values = self._room.take(len(to))
        self.unpack(payload, values)
        np.add(to, values, out=to)

    def pack_sum(self, payload: Bytes, values: Vector, noise: int, out: Bytes) -> None:
        self.add(payload, values)
        self.pack(values, noise, out)


class Int8:
    """Multiples of a power of two, from -127 to 127, each block having its own.

    A payload has the scales' exponents first, then the multiples.
    """

    times = 4

    def __init__(self) -> None:
        self._noise = _Repeated(_CENTERED)
        self._room = _Room()

    def size(self, elements: int) -> int:
        return _blocks(elements) + elements

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        length, blocks = len(values), _blocks(len(values))
        room, multiples = self._room.take(length), out[blocks:].view(np.int8)
        chances = self._noise.take(noise, length)
        for rows, cut in _rows(length):
            given, scaled = _matrix(values[cut]), _matrix(room[cut])
            peaks = torch.abs(given, out=scaled).amax(1).numpy()
            out[rows] = stored = _exponents(peaks)
            reciprocals = _column(_SCALE_OF[ONE_SQUARED - stored])
            torch.addcmul(_matrix(chances[cut]), given, reciprocals, out=scaled)
            odd = stored == NOT_FINITE
            if odd.any():
                scaled[torch.from_numpy(odd)] = 0.0
            torch.from_numpy(multiples[cut]).copy_(scaled.round_().view(-1))

    def unpack(self, payload: Bytes, out: Vector) -> None:
        for rows, cut in self._widened(payload, out):
            _matrix(out[cut]).mul_(_column(_SCALE_OF[payload[rows]]))

    def add(self, payload: Bytes, to: Vector) -> None:
        room = self._room.take(len(to))
        for rows, cut in self._widened(payload, room):
            sums = _matrix(to[cut])
            sums.add_(_matrix(room[cut]).mul_(_column(_SCALE_OF[payload[rows]])))
            odd = payload[rows] == NOT_FINITE
            if odd.any():  # which of two NaNs a sum is, is not defined
                sums[torch.from_numpy(odd)] = torch.nan

    def pack_sum(self, payload: Bytes, values: Vector, noise: int, out: Bytes) -> None:
        self.add(payload, values)
        self.pack(values, noise, out)

    def _widened(self, payload: Bytes, out: Vector) -> list[tuple[slice, slice]]:
        np.copyto(out, payload[_blocks(len(out)) :].view(np.int8))
        return _rows(len(out))


class CompiledInt8:
    """The same bits as `Int8`, sooner."""

    times = Int8.times

    def __init__(self) -> None:
        # a block's chances lie in one piece wherever they begin
        self._chances = np.append(_CENTERED, _CENTERED[:BLOCK])

    def size(self, elements: int) -> int:
        return _blocks(elements) + elements

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        _int8.pack(values, self._chances, noise % NOISE_PERIOD, out)

    def pack_sum(self, payload: Bytes, values: Vector, noise: int, out: Bytes) -> None:
        _int8.pack(values, self._chances, noise % NOISE_PERIOD, out, payload)

    def unpack(self, payload: Bytes, out: Vector) -> None:
        _int8.unpack(payload, out)

    def add(self, payload: Bytes, to: Vector) -> None:
        _int8.add(payload, to)


IS_COMPILED = _int8 is not None


def int8() -> Int8 | CompiledInt8:
    """The fastest that there is here."""
    return CompiledInt8() if IS_COMPILED else Int8()


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _rows(length: int) -> list[tuple[slice, slice]]:
    """The whole blocks and what is left: which scales, and which elements."""
    whole = length // BLOCK
    parts = [
        (slice(0, whole), slice(0, whole * BLOCK)),
        (slice(whole, whole + 1), slice(whole * BLOCK, length)),
    ]
    return [(rows, cut) for rows, cut in parts if cut.start < cut.stop]


def _matrix(values: Vector) -> Tensor:
    """A block in each row."""
    return torch.from_numpy(values).view(-1, min(BLOCK, len(values)))


def _column(values: Vector) -> Tensor:
    return torch.from_numpy(values)[:, None]


def _exponents(peaks: Vector) -> Bytes:
    """Of each block's scale, the least power of two of which 127 reach the peak, as float32 has it.

    It is the peak's own exponent less 6, or less 5 if its mantissa is beyond that of 127.
    """
    bits = peaks.view(np.int32)
    stored = np.maximum(((bits + _UP_FROM_127_64THS) >> _MANTISSA_BITS) - 6, 1)
    return np.where(bits < _INFINITY_BITS, stored, NOT_FINITE).astype(np.uint8)
