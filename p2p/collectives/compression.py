"""Fewer bytes for gradients on their way.

Rounding is stochastic, so it is right on average, and its noise follows from the run's seed, the
step, and the node and unit that it is for: whoever computes a hop, computes the same bits. Nothing
is remembered from one step to the next, as error feedback would; that would die with its peer.

What was rounded once stays what it is when it is rounded again, whatever the noise, so a total can
be passed on by any peer that has it, in either form.

Only gradients are rounded. Marks, counters, running statistics and the loss, which follow them in
a contribution, travel as they are. The arithmetic is in `rounding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from p2p.collectives.memory import Bytes, Vector
from p2p.collectives.schedule import Unit

ALIGNMENT = 64
_SEED = Struct("<qqqq")


class Compression(Protocol):
    """One way to write a vector with fewer bytes. Not safe to share between threads."""

    times: int
    """How many times as many bytes float32 takes, scales left aside."""

    def size(self, elements: int) -> int:
        """Bytes of a payload."""

    def pack(self, values: Vector, noise: int, out: Bytes) -> None:
        """Rounds the values; `noise` says how."""

    def unpack(self, payload: Bytes, out: Vector) -> None: ...

    def add(self, payload: Bytes, to: Vector) -> None: ...

    def pack_sum(self, payload: Bytes, values: Vector, noise: int, out: Bytes) -> None:
        """Adds and packs at once; the values are of no use afterwards."""


def compression(name: str) -> Compression:
    """`bf16` or `int8`."""
    from p2p.collectives import rounding  # brings in torch, for which a booting peer has no time

    return rounding.Bf16() if name == "bf16" else rounding.int8()


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
        self._compression.pack(values, self._noise(unit, step, node), out)

    def pack_sum(
        self, unit: int, step: int, node: int, payload: Bytes, values: Vector, out: Bytes
    ) -> None:
        """Adds and packs at once; the values are of no use afterwards."""
        self._compression.pack_sum(payload, values, self._noise(unit, step, node), out)

    def unpack(self, payload: Bytes, out: Vector) -> None:
        self._compression.unpack(payload, out)

    def add(self, payload: Bytes, to: Vector) -> None:
        self._compression.add(payload, to)

    def _noise(self, unit: int, step: int, node: int) -> int:
        return xxh3_64_intdigest(_SEED.pack(self._seed, step, node, unit))
