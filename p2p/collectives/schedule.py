"""What a collective is: for every chunk of the vector, one tree to sum along and one to spread.

A schedule is a graph over the shards (*nodes*), fixed for a run. Its hops say which node sends
which chunk to which node in which round, and whether the receiver adds what arrives or copies it.
Since an addition's operands and their order are in the schedule, the sum's bits depend on nothing
else: not on which peer plays which node, and not on how often a hop was made.

A node adds its reduce hops in the order of their rounds, hands the result on once, and later
copies the total and spreads it. `ring.py`, `butterfly.py` and `direct.py` only generate schedules;
`allgather.py` has an executor of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from p2p.collectives.butterfly import butterfly_hops
from p2p.collectives.direct import direct_hops
from p2p.collectives.hops import Hop
from p2p.collectives.ring import ring_hops

GENERATORS: dict[str, Callable[[int], tuple[int, list[Hop]]]] = {
    "ring": ring_hops,
    "butterfly": butterfly_hops,
    "direct": direct_hops,
}
ALLGATHER = "allgather"
ALLGATHER_NODES = 8
"""With more, each would make too many additions."""
MORE_BYTES = 96 << 10
"""So many more than with direct each may receive for the sake of one hop less: what a link of 600
Mbit/s carries in 1.3 ms, and a hop takes about as long."""
MORE_BYTES_WITHIN_HOST = 2 << 20
"""Where they are in shared memory, and it is the additions that cost."""
SHORT_BYTES = 4 << 20
"""Up to here direct's two hops are faster than the ring's many."""
RING_TIMES = 6
"""So many times as long the ring's segments may be if they are not compressed: each costs time, and
all peers of the ring send at once, so that no link waits for a segment's end."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one node does for one chunk; each hop is (round, the other node)."""

    adds: tuple[tuple[int, int], ...]
    """In this order the node adds what arrives to its own contribution."""
    result: tuple[int, int] | None
    """Where the sum goes; None at the chunk's owner, whose sum is the total."""
    copy: tuple[int, int] | None
    """Where the total comes from; None at the owner."""
    spread: tuple[tuple[int, int], ...]
    """Whom the node sends the total."""

    def place_of(self, round: int) -> int | None:
        """Which of the adds is that of this round."""
        for place, (each, _) in enumerate(self.adds):
            if each == round:
                return place
        return None

    def hears(self, round: int) -> bool:
        """Whether anything of the chunk arrives in this round."""
        if self.copy is not None and self.copy[0] == round:
            return True
        return self.place_of(round) is not None


@dataclass(frozen=True, slots=True)
class Schedule:
    """`parts[chunk][node]`, for `nodes` shards and `chunks` equal shares of the vector."""

    name: str
    nodes: int
    chunks: int
    parts: tuple[tuple[Part, ...], ...]
    reduce_rounds: int
    """Rounds below this one carry sums to add, the others totals to copy."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The vector's elements from `start` to `stop`, which travel as one segment."""

    chunk: int
    start: int
    stop: int


@lru_cache(maxsize=32)
def make_schedule(name: str, nodes: int) -> Schedule:
    """The schedule of a `GENERATORS`, or `ALLGATHER`, over `nodes` shards, from 1 on."""
    if name == ALLGATHER:
        return _allgather(nodes)
    chunks, hops = GENERATORS[name](nodes)
    by_round = sorted(hops, key=lambda hop: hop.round)
    parts = []
    for chunk in range(chunks):
        mine = [hop for hop in by_round if hop.chunk == chunk]
        parts.append(tuple([_part(node, mine) for node in range(nodes)]))
    rounds = 1 + max((hop.round for hop in hops if hop.adds), default=-1)
    return Schedule(name, nodes, chunks, tuple(parts), rounds)


def schedule_for(
    collective: str, nodes: int, length: int, compressed: bool = False, within_host: bool = False
) -> Schedule:
    """For vectors of `length` float32.

    Ring, direct and allgather give the same bits but for compression, so in place of the ring's
    many hops a short one makes direct's two, or one.
    """
    if collective == "ring" and 4 * length <= SHORT_BYTES:
        more_bytes = 4 * length * (nodes - 1) * (nodes - 2) // nodes
        limit = MORE_BYTES_WITHIN_HOST if within_host else MORE_BYTES
        is_short = nodes <= ALLGATHER_NODES and more_bytes <= limit
        return make_schedule(ALLGATHER if is_short and not compressed else "direct", nodes)
    return make_schedule(collective, nodes)


def _allgather(nodes: int) -> Schedule:
    """One chunk, of which each node hears from all others; the round is the other's number."""
    parts = []
    for node in range(nodes):
        others = [(other, other) for other in range(nodes) if other != node]
        parts.append(Part(adds=tuple(others), result=None, copy=None, spread=()))
    return Schedule(ALLGATHER, nodes, 1, (tuple(parts),), reduce_rounds=nodes)


def _part(node: int, hops: list[Hop]) -> Part:
    results = [(hop.round, hop.destination) for hop in hops if hop.adds and hop.source == node]
    copies = [(hop.round, hop.source) for hop in hops if not hop.adds and hop.destination == node]
    return Part(
        adds=tuple([(h.round, h.source) for h in hops if h.adds and h.destination == node]),
        result=results[0] if results else None,
        copy=copies[0] if copies else None,
        spread=tuple([(h.round, h.destination) for h in hops if not h.adds and h.source == node]),
    )


@lru_cache(maxsize=32)
def make_units(
    length: int, chunks: int, segment_bytes: int, cut_at: int = 0, times: int = 1
) -> tuple[Unit, ...]:
    """Cuts `length` float32 elements into the chunks, and these into segments.

    Segments of a chunk have even sizes, at most `segment_bytes`; a chunk without elements has none.
    No segment has elements from both sides of `cut_at`; the chunk's two parts are even by
    themselves. Those before it have up to `times` as many elements, for they are compressed.
    """
    units: list[Unit] = []
    for chunk in range(chunks):
        start, stop = chunk * length // chunks, (chunk + 1) * length // chunks
        middle = min(max(start, cut_at), stop)
        units += _pieces(chunk, start, middle, times * segment_bytes)
        units += _pieces(chunk, middle, stop, segment_bytes)
    return tuple(units)


def _pieces(chunk: int, start: int, stop: int, segment_bytes: int) -> list[Unit]:
    size = stop - start
    pieces = -(-size // max(segment_bytes // 4, 1))
    return [
        Unit(chunk, start + piece * size // pieces, start + (piece + 1) * size // pieces)
        for piece in range(pieces)
    ]
