"""Runs a schedule for the shards that one peer plays, segment by segment. Sans-I/O.

One executor serves one step. It takes contributions and segments in any order, any number of times,
and appends to `out` what is ready to be sent; who plays the destination, and whether that is this
very peer, is asked of the view each time, so a view change loses nothing: what was added stays,
what is new is computed, what moved is sent again.

Every node keeps its partial sums until the step is done, so an ask can be answered at any time.
A peer that plays k shards therefore holds k vectors and the mean, and, if they are packed, of each
what it handed on.

With a packing, what a node hands on is rounded first, also where the next node is of the same peer:
the sum must not depend on who plays which node. The owner of a chunk rounds its total likewise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from p2p.collectives.compression import Packing
from p2p.collectives.memory import Bytes, Memory, PlainMemory, Vector
from p2p.collectives.schedule import Schedule, Unit


class Outgoing(NamedTuple):
    """A segment that is ready: node `source` sends it to node `destination`."""

    round: int
    unit: int
    source: int
    destination: int


Values = Vector | Bytes
"""A segment's, as they are or packed."""


class Missing(NamedTuple):
    """A segment that a node of this peer waits for; node `source` sends it."""

    round: int
    unit: int
    source: int
    destination: int


class Executor:
    """The collective of one step. `length` is the number of float32 elements of a contribution."""

    def __init__(
        self,
        schedule: Schedule,
        units: Sequence[Unit],
        length: int,
        memory: Memory | None = None,
        packing: Packing | None = None,
        step: int = 0,
    ) -> None:
        self.schedule = schedule
        self.units = units
        self._memory = memory or PlainMemory()
        self._packing = packing
        self._step = step
        self.mean: Vector = self._memory.take(length)
        self.out: list[Outgoing] = []
        self._nodes: set[int] = set()
        self._sums: dict[int, Vector] = {}
        self._ready: dict[int, tuple[int, int]] = {}
        """Of each node's contribution the range of elements that are there."""
        self._added: dict[int, list[int]] = {}
        """For each node and unit, how many of the schedule's adds are in the sum."""
        self._packed: dict[tuple[int, int], Bytes] = {}
        """What each node has handed on of a unit, and, under the number after the last node, the
        unit's total, as they travel: (node, unit)."""
        self._rooms: dict[int, Vector] = {}
        """For what is packed here, by its node."""
        self._parked: dict[tuple[int, int, int], Values] = {}
        """Segments that came before the contribution or an earlier add: (round, unit, node)."""
        self._partly: dict[tuple[int, int], int] = {}
        """How many elements of the next add are in the sum: (node, unit)."""
        self._lent: dict[int, memoryview] = {}
        """Where a unit's total is being written by whoever receives it."""
        self._have_total = [False] * len(units)
        self._totals_missing = len(units)

    # --- what comes in ----------------------------------------------------------------------

    def play(self, nodes: Collection[int]) -> None:
        """This peer plays exactly these nodes from now on. Sums of former nodes are kept.

        Afterwards `ready()` says what is to be sent in the new view; `out` starts empty.
        """
        if self._nodes == set(nodes):
            return
        self._nodes = set(nodes)
        for node in self._nodes.intersection(self._sums):
            for unit in range(len(self.units)):
                self._advance(node, unit)
        self.out.clear()

    def needs(self, node: int) -> bool:
        """Whether the node's contribution is still to be computed."""
        return self._ready.get(node) != (0, len(self.mean)) and self._totals_missing > 0

    def contribute(self, node: int, vector: Vector) -> None:
        """The node's own contribution; the executor may add to it in place from here on."""
        # a vector of one element would be broadcast, one of float64 rounded at other places
        assert vector.shape == self.mean.shape and vector.dtype == np.float32
        if self.needs(node):
            self.contribute_part(node, vector, 0, len(vector))

    def contribute_part(self, node: int, vector: Vector, start: int, stop: int) -> None:
        """Of the node's contribution this range is there, which grows from call to call."""
        before, end = self._ready.get(node, (start, start))
        mine = self._sums.setdefault(node, vector)
        if mine is not vector:  # computed once more: what is there may have been added to
            mine[start:before] = vector[start:before]
            mine[end:stop] = vector[end:stop]
        self._added.setdefault(node, [0] * len(self.units))
        self._ready[node] = (min(start, before), max(stop, end))
        for unit, cut in enumerate(self.units):
            is_new = not (before <= cut.start and cut.stop <= end)
            if is_new and self._is_ready(node, cut):
                self._advance(node, unit)

    def receive(self, round: int, unit: int, node: int, payload: bytes | memoryview) -> bool:
        """A segment for `node` arrived. False when it does not fit or is of no use.

        One that was added while it came has no payload.
        """
        if not (0 <= unit < len(self.units) and 0 <= node < self.schedule.nodes):
            return False
        part = self.schedule.parts[self.units[unit].chunk][node]
        if part.copy is not None and part.copy[0] == round:
            return self._receive_copy(unit, payload)
        if not payload and self.is_next(round, unit, node):
            return self._advance(node, unit)
        place = part.place_of(round)
        if place is None or self._have_total[unit] or not self._fits(unit, payload):
            return False
        added = self._added.get(node)
        if (added is not None and place < added[unit]) or (round, unit, node) in self._parked:
            return False
        values: Values = np.frombuffer(payload, dtype=np.uint8)
        if self._packing_of(unit) is None:
            values = values.view(np.float32)
        self._parked[(round, unit, node)] = values
        self._advance(node, unit)
        return True

    def receive_total(self, unit: int, payload: bytes | memoryview) -> bool:
        """A unit of the mean, unpacked, from whichever peer has it."""
        if not 0 <= unit < len(self.units) or self._have_total[unit]:
            return False
        cut = self.units[unit]
        if len(payload) != 4 * (cut.stop - cut.start):
            return False
        if payload is not self._lent.get(unit):
            self.mean[cut.start : cut.stop] = np.frombuffer(payload, dtype=np.float32)
        self._spread_total(unit)
        return True

    def place(self, round: int, unit: int, node: int) -> memoryview | None:
        """Where a total that comes may be written before it is received; None for all else.

        Written there a second time, it is the same bytes. Packed, the same total may be other
        bytes, by whoever had it unpacked, so such a one is received as a whole.
        """
        if not (0 <= unit < len(self.units) and 0 <= node < self.schedule.nodes):
            return None
        copy = self.schedule.parts[self.units[unit].chunk][node].copy
        if copy is None or copy[0] != round or self._have_total[unit]:
            return None
        if self._packing_of(unit) is not None:
            return None
        if unit not in self._lent:
            cut = self.units[unit]
            self._lent[unit] = self.mean[cut.start : cut.stop].view(np.uint8).data
        return self._lent[unit]

    def is_next(self, round: int, unit: int, node: int) -> bool:
        """Whether a segment that the schedule has can be added while it comes."""
        cut, added = self.units[unit], self._added.get(node)
        return (
            added is not None
            and self.schedule.parts[cut.chunk][node].place_of(round) == added[unit]
            and self._is_ready(node, cut)
            and not self._have_total[unit]
            and self._packing_of(unit) is None
        )

    def add_piece(self, round: int, unit: int, node: int, start: int, piece: memoryview) -> None:
        """Adds these bytes of a segment, unless they are in the sum; each begins with byte `start`.

        Several may bring the same segment at once.
        """
        if self.is_next(round, unit, node):
            self._add_elements(node, unit, np.frombuffer(piece, np.float32), start // 4)

    # --- what goes out ----------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return self._totals_missing == 0

    def identity(self, outgoing: Outgoing) -> tuple[int, int, int]:
        """Equal for those of which a peer needs one, whichever of its nodes they are for."""
        round, unit, _, destination = outgoing
        if round >= self.schedule.reduce_rounds:
            return -1, unit, -1
        return round, unit, destination

    def payload(self, round: int, unit: int, node: int) -> Values | None:
        """The segment for `node` in `round`, if it is known here; a view that nothing changes."""
        if not (0 <= unit < len(self.units) and 0 <= node < self.schedule.nodes):
            return None
        if round >= self.schedule.reduce_rounds:
            total = self.total(unit)
            return total if total is None else self._handed_on(self.schedule.nodes, unit, total)
        part = self.schedule.parts[self.units[unit].chunk][node]
        source = next((source for r, source in part.adds if r == round), None)
        result = self._result(source, unit) if source is not None else None
        if source is None or result is None:
            return None
        return self._handed_on(source, unit, result)

    def total(self, unit: int) -> Vector | None:
        if not 0 <= unit < len(self.units) or not self._have_total[unit]:
            return None
        cut = self.units[unit]
        return self.mean[cut.start : cut.stop]

    def ready(self) -> list[Outgoing]:
        """Everything that this peer's nodes have to send to others so far; for a changed view."""
        found: list[Outgoing] = []
        for unit, cut in enumerate(self.units):
            for node in self._nodes:
                part = self.schedule.parts[cut.chunk][node]
                if self._have_total[unit]:
                    found += [Outgoing(r, unit, node, to) for r, to in part.spread]
                elif part.result is not None and self._result(node, unit) is not None:
                    found.append(Outgoing(part.result[0], unit, node, part.result[1]))
        return [each for each in found if each.destination not in self._nodes]

    def missing(self) -> list[Missing]:
        """What to ask for: the next segment that each unit of each node waits for."""
        found: list[Missing] = []
        for unit, cut in enumerate(self.units):
            if self._have_total[unit]:
                continue
            for node in self._nodes:
                part = self.schedule.parts[cut.chunk][node]
                added = self._added[node][unit] if node in self._added else 0
                waits = [
                    (round, source)
                    for round, source in part.adds[added:]
                    if (round, unit, node) not in self._parked
                ][:1]
                if not waits and node in self._sums and part.copy is not None:
                    waits = [part.copy]
                found += [Missing(round, unit, source, node) for round, source in waits]
        return [each for each in found if each.source not in self._nodes]

    # --- inside -----------------------------------------------------------------------------

    def _fits(self, unit: int, payload: bytes | memoryview) -> bool:
        cut = self.units[unit]
        size = 4 * (cut.stop - cut.start) if self._packing is None else self._packing.size(unit)
        return len(payload) == size

    def _packing_of(self, unit: int) -> Packing | None:
        """None for one that travels as it is."""
        packing = self._packing
        return packing if packing is not None and packing.packs(unit) else None

    def _handed_on(self, node: int, unit: int, values: Vector) -> Values:
        """The sum of a node, or the total, as it travels."""
        packing = self._packing_of(unit)
        if packing is None:
            return values
        packed = self._packed.get((node, unit))
        if packed is None:
            packed = self._place(packing, node, unit)
            packing.pack(unit, self._step, node, values, packed)
        return packed

    def _place(self, packing: Packing, node: int, unit: int) -> Bytes:
        """Where a unit is to be packed."""
        room = self._rooms.get(node)
        if room is None:
            room = self._rooms[node] = self._memory.take(packing.length)
        place = self._packed[(node, unit)] = packing.place(unit, room)
        return place

    def _receive_copy(self, unit: int, payload: bytes | memoryview) -> bool:
        """A total, as it travels; passed on as it is."""
        packing = self._packing_of(unit)
        if packing is None:
            return self.receive_total(unit, payload)
        if self._have_total[unit] or not self._fits(unit, payload):
            return False
        packed: Bytes = np.frombuffer(payload, dtype=np.uint8)
        if packed.flags.writeable and not self._memory.is_shared:  # it can stay there
            self._packed[(self.schedule.nodes, unit)] = packed
        else:
            place = self._place(packing, self.schedule.nodes, unit)
            place[:] = packed
            packed = place
        self._set_total(unit, packed)
        return True

    def _advance(self, node: int, unit: int) -> bool:
        """Adds what can be added, and hands the sum on when it is whole. False: nothing was."""
        cut = self.units[unit]
        if self._have_total[unit] or not self._is_ready(node, cut):
            return False
        part, added = self.schedule.parts[cut.chunk][node], self._added[node]
        before = added[unit]
        for round, source in part.adds[before:]:
            values = self._parked.pop((round, unit, node), None)
            if values is None and source in self._nodes:
                values = self.payload(round, unit, node)  # both ends are here
            if values is not None:
                self._add(node, unit, values)
            if self._partly.get((node, unit)) != cut.stop - cut.start:
                return added[unit] > before
            del self._partly[(node, unit)]
            added[unit] += 1
        if part.result is None:
            if part.adds and self._packing_of(unit) is None:
                self._spread_total(unit)  # the last add was into the mean
            else:
                mine = self._sums[node][cut.start : cut.stop]
                self._set_total(unit, self._handed_on(self.schedule.nodes, unit, mine))
        elif part.result[1] in self._nodes:
            self._advance(part.result[1], unit)
        else:
            self.out.append(Outgoing(part.result[0], unit, node, part.result[1]))
        return True

    def _is_ready(self, node: int, cut: Unit) -> bool:
        start, stop = self._ready.get(node, (0, 0))
        return start <= cut.start and cut.stop <= stop

    def _result(self, node: int, unit: int) -> Vector | None:
        """The node's whole sum of the unit, or None while something is to be added."""
        added = self._added.get(node)
        cut = self.units[unit]
        if added is None or not self._is_ready(node, cut):
            return None
        if added[unit] < len(self.schedule.parts[cut.chunk][node].adds):
            return None
        return self._sums[node][cut.start : cut.stop]

    def _add(self, node: int, unit: int, values: Values) -> None:
        """Adds a segment, but for what is in the sum already."""
        packing = self._packing_of(unit)
        if packing is None:
            self._add_elements(node, unit, values, 0)
            return
        cut, payload = self.units[unit], values.view(np.uint8)
        mine = self._sums[node][cut.start : cut.stop]
        if self._is_last_add(node, unit):  # from here on only its packed form is asked for
            is_owner = self.schedule.parts[cut.chunk][node].result is None
            giver = self.schedule.nodes if is_owner else node
            place = self._place(packing, giver, unit)
            packing.pack_sum(unit, self._step, giver, payload, mine, place)
        else:
            packing.add(payload, mine)
        self._partly[(node, unit)] = cut.stop - cut.start

    def _add_elements(self, node: int, unit: int, values: Values, start: int) -> None:
        """Adds a segment's elements from `start` on, but for those that are in the sum already."""
        cut = self.units[unit]
        done, stop = self._partly.get((node, unit), 0), start + len(values)
        if start <= done < stop:
            mine = self._sums[node][cut.start + done : cut.start + stop]
            is_owner = self.schedule.parts[cut.chunk][node].result is None
            makes_total = is_owner and self._is_last_add(node, unit)
            into = self.mean[cut.start + done : cut.start + stop] if makes_total else mine
            np.add(mine, values[done - start :], out=into)
            self._partly[(node, unit)] = stop

    def _is_last_add(self, node: int, unit: int) -> bool:
        adds = self.schedule.parts[self.units[unit].chunk][node].adds
        return self._added[node][unit] + 1 == len(adds)

    def _set_total(self, unit: int, values: Values) -> None:
        cut = self.units[unit]
        mean = self.mean[cut.start : cut.stop]
        packing = self._packing_of(unit)
        if packing is None:
            mean[:] = values
        else:
            packing.unpack(values.view(np.uint8), mean)
        self._spread_total(unit)

    def _spread_total(self, unit: int) -> None:
        self._have_total[unit] = True
        self._totals_missing -= 1
        chunk = self.units[unit].chunk
        for node in self._nodes:
            for round, destination in self.schedule.parts[chunk][node].spread:
                if destination not in self._nodes:
                    self.out.append(Outgoing(round, unit, node, destination))
