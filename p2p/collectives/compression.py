"""Fewer bytes for gradients on their way: bf16, or int8 with a scale for each block.

Rounding is stochastic, so it is right on average, and its noise follows from the run's seed, the
step, and the node and unit that it is for: whoever computes a hop, computes the same bits. Nothing
is remembered from one step to the next, as error feedback would; that would die with its peer.

What was rounded once stays what it is when it is rounded again, whatever the noise (scales are
powers of two), so a total can be passed on by any peer that has it, in either form.

Only gradients are rounded. Marks, counters, running statistics and the loss, which follow them in
a contribution, travel as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from p2p.collectives.memory import Vector
from p2p.collectives.schedule import Unit

Bytes = npt.NDArray[np.uint8]

NOISE_PERIOD = 1 << 16
BLOCK = 256
"""Elements with one scale; a payload has one byte for it."""
EXPONENT_BIAS = 127
LEAST_EXPONENT = -126
NOT_FINITE = 255
"""In place of a scale: something in the block is infinite or no number."""
ALIGNMENT = 64
_SEED = Struct("<qqqq")


class Compression(Protocol):
    """One way to write a vector with fewer bytes. Not safe to share between threads."""

    def size(self, elements: int) -> int:
        """Bytes of a payload."""

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        """Rounds the values; `noise` says how."""

    def unpack(self, payload: Bytes, out: Vector) -> None: ...

    def add(self, payload: Bytes, to: Vector) -> None: ...


class _Scratch:
    """Room for what is computed in between, and the noise."""

    def __init__(self) -> None:
        # every value of 16 bits once, so that over all places where it may begin it is uniform
        self._permutation = np.random.default_rng(0).permutation(NOISE_PERIOD)
        self._noise: npt.NDArray[np.float32 | np.uint32] = self._made(2 * NOISE_PERIOD)
        self._vector = np.empty(0, np.float32)

    def _made(self, length: int) -> npt.NDArray[np.float32 | np.uint32]:
        raise NotImplementedError

    def noise(self, start: int, length: int) -> npt.NDArray[np.float32 | np.uint32]:
        start %= NOISE_PERIOD
        if start + length > len(self._noise):
            self._noise = self._made(NOISE_PERIOD + length)
        return self._noise[start : start + length]

    def vector(self, length: int) -> Vector:
        if len(self._vector) < length:
            self._vector = np.empty(length, np.float32)
        return self._vector[:length]


class Bf16(_Scratch):
    """The upper half of each float32: 8 bits of precision, and the whole range."""

    def _made(self, length: int) -> npt.NDArray[np.float32 | np.uint32]:
        return np.resize(self._permutation.astype(np.uint32), length)

    def size(self, elements: int) -> int:
        return 2 * elements

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        # what is added to the lower half carries into the upper one as often as it should
        sums = self.vector(len(values)).view(np.uint32)
        np.add(values.view(np.uint32), self.noise(noise, len(values)), out=sums)
        np.right_shift(sums, 16, out=sums)
        np.copyto(out.view(np.uint16), sums, casting="unsafe")
        odd = np.isnan(values)
        if odd.any():  # a carry could make it an infinity, or a zero
            out.view(np.uint16)[odd] = 0x7FC0

    def unpack(self, payload: Bytes, out: Vector) -> None:
        np.left_shift(payload.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)

    def add(self, payload: Bytes, to: Vector) -> None:
        values = self.vector(len(to))
        self.unpack(payload, values)
        np.add(to, values, out=to)


class Int8(_Scratch):
    """Multiples of a power of two, from -127 to 127, each block having its own.

    A payload has the scales' exponents first, then the multiples.
    """

    def _made(self, length: int) -> npt.NDArray[np.float32 | np.uint32]:
        # in the middle of its step, and around zero: rounding to the nearest does the rest
        centered = (self._permutation.astype(np.float32) + 0.5) / NOISE_PERIOD - 0.5
        return np.resize(centered.astype(np.float32), length)

    def size(self, elements: int) -> int:
        return _blocks(elements) + elements

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        length, blocks = len(values), _blocks(len(values))
        scaled = self.vector(blocks * BLOCK)
        scaled[length:] = 0.0
        np.abs(values, out=scaled[:length])
        peaks = scaled.reshape(blocks, BLOCK).max(axis=1)
        exponents, unscale = _exponents(peaks)
        out[:blocks] = exponents
        scaled[:length] = values
        rows = scaled.reshape(blocks, BLOCK)
        rows[exponents == NOT_FINITE] = 0.0
        np.multiply(rows, unscale[:, None], out=rows)
        rounded = scaled[:length]
        np.add(rounded, self.noise(noise, length), out=rounded)
        np.rint(rounded, out=rounded)
        np.copyto(out[blocks:].view(np.int8), rounded, casting="unsafe")

    def unpack(self, payload: Bytes, out: Vector) -> None:
        length, blocks = len(out), _blocks(len(out))
        scales = _scales(payload[:blocks])
        whole = length - length % BLOCK
        np.copyto(out, payload[blocks:].view(np.int8))
        rows = out[:whole].reshape(-1, BLOCK)
        np.multiply(rows, scales[: len(rows), None], out=rows)
        if whole < length:
            np.multiply(out[whole:], scales[-1], out=out[whole:])

    def add(self, payload: Bytes, to: Vector) -> None:
        values = self.vector(len(to))
        self.unpack(payload, values)
        np.add(to, values, out=to)


KINDS: dict[str, type[Bf16] | type[Int8]] = {"bf16": Bf16, "int8": Int8}


class Packing:
    """How the units of a run's vectors travel: those before element `exact_from` rounded.

    A vector of `length` float32 has room for all of a node's payloads.
    """

    def __init__(
        self, compression: Compression, units: Sequence[Unit], exact_from: int, seed: int
    ) -> None:
        self._compression = compression
        self._units = units
        self._seed = seed
        self._places: dict[int, slice] = {}
        end = 0
        for number, unit in enumerate(units):
            if unit.stop <= exact_from:
                size = compression.size(unit.stop - unit.start)
                self._places[number] = slice(end, end + size)
                end += -(-size // ALIGNMENT) * ALIGNMENT
        self.length = end // 4

    def packs(self, unit: int) -> bool:
        return unit in self._places

    def size(self, unit: int) -> int:
        """Bytes of the unit's payload, rounded or not."""
        place, cut = self._places.get(unit), self._units[unit]
        return 4 * (cut.stop - cut.start) if place is None else place.stop - place.start

    def place(self, unit: int, packed: Vector) -> Bytes:
        """The unit's payload in a vector of payloads."""
        return packed.view(np.uint8)[self._places[unit]]

    def pack(self, unit: int, step: int, node: int, values: Vector, out: Bytes) -> None:
        noise = xxh3_64_intdigest(_SEED.pack(self._seed, step, node, unit))
        self._compression.pack(values, noise, out)

    def unpack(self, payload: Bytes, out: Vector) -> None:
        self._compression.unpack(payload, out)

    def add(self, payload: Bytes, to: Vector) -> None:
        self._compression.add(payload, to)


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _exponents(peaks: Vector) -> tuple[Bytes, Vector]:
    """For each block the least power of two of which 127 reach its peak, and its reciprocal."""
    fractions, exponents = np.frexp(peaks)
    exponents = np.maximum(exponents - 7 + (fractions > 127 / 128), LEAST_EXPONENT)
    stored = (exponents + EXPONENT_BIAS).astype(np.uint8)
    stored[~np.isfinite(peaks)] = NOT_FINITE
    return stored, np.ldexp(np.float32(1), -exponents)


_SCALES = np.ldexp(np.float32(1), np.arange(NOT_FINITE) - EXPONENT_BIAS).astype(np.float32)
_SCALE_OF: Vector = np.append(_SCALES, np.float32(np.nan))


def _scales(stored: Bytes) -> Vector:
    return _SCALE_OF[stored]
