"""Allreduce of a short vector in one hop: everyone gets all contributions, and adds them itself.

Every node sends its contribution to all others as it is, so it takes one message's way and half as
many messages as `direct.py`, for more bytes. All peers make the same additions: chunk c of as many
as there are nodes is summed as ((x[c] + x[c+1]) + x[c+2]) + … (mod nodes), which is the ring's
order, so all three give the same bits. A round is the number of the node whose contribution it is.

Not with compression, which would round what the others round and not a node's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2p.collectives.executor import Executor, Missing, Outgoing
from p2p.collectives.memory import Memory, Vector
from p2p.collectives.schedule import Schedule, Unit


class AllGather(Executor):
    """As the other executors, for the schedule `allgather`. Contributions stay as they are."""

    def __init__(
        self, schedule: Schedule, units: Sequence[Unit], length: int, memory: Memory | None = None
    ) -> None:
        super().__init__(schedule, units, length, memory)
        self._given: dict[tuple[int, int], Vector] = {}
        """(node, unit) of what is to be added."""

    def receive(self, round: int, unit: int, node: int, payload: bytes | memoryview) -> bool:
        if not (0 <= unit < len(self.units) and 0 <= node < self.schedule.nodes):
            return False
        if not self.schedule.parts[0][node].hears(round):
            return False
        if self._have_total[unit] or (round, unit) in self._given or not self._fits(unit, payload):
            return False
        self._given[round, unit] = np.frombuffer(payload, np.float32)
        self._sum(unit)
        return True

    def is_next(self, round: int, unit: int, node: int) -> bool:
        return False

    def identity(self, outgoing: Outgoing) -> tuple[int, int, int]:
        return outgoing.round, outgoing.unit, -1

    def payload(self, round: int, unit: int, node: int) -> Vector | None:
        """Of contributions that were computed here: others' may lie in memory that is not ours.

        So of a node whose peer died, an adopter computes it anew, whoever else has it.
        """
        if not (0 <= unit < len(self.units) and 0 <= node < self.schedule.nodes):
            return None
        if node == round or not self._is_ready(round, self.units[unit]):
            return None
        cut = self.units[unit]
        return self._sums[round][cut.start : cut.stop]

    def ready(self) -> list[Outgoing]:
        return [
            each
            for unit, cut in enumerate(self.units)
            for node in self._nodes
            if self._is_ready(node, cut)
            for each in self._to_others(node, unit)
        ]

    def missing(self) -> list[Missing]:
        if not self._nodes:
            return []
        mine = min(self._nodes)
        return [
            Missing(node, unit, node, mine)
            for unit in range(len(self.units))
            if not self._have_total[unit]
            for node in range(self.schedule.nodes)
            if node not in self._nodes and (node, unit) not in self._given
        ]

    # --- inside -----------------------------------------------------------------------------

    def _to_others(self, node: int, unit: int) -> list[Outgoing]:
        others = [each for each in range(self.schedule.nodes) if each not in self._nodes]
        return [Outgoing(node, unit, node, other) for other in others]

    def _advance(self, node: int, unit: int) -> bool:
        """The node's own contribution of the unit is there."""
        cut = self.units[unit]
        if not self._is_ready(node, cut):
            return False
        self._given.setdefault((node, unit), self._sums[node][cut.start : cut.stop])
        self.out += self._to_others(node, unit)
        self._sum(unit)
        return True

    def _sum(self, unit: int) -> None:
        nodes, cut = self.schedule.nodes, self.units[unit]
        given = [self._given.get((node, unit)) for node in range(nodes)]
        values = [each for each in given if each is not None]
        if self._have_total[unit] or len(values) < nodes:
            return
        mean = self.mean[cut.start : cut.stop]
        for chunk in range(nodes):
            start = max(chunk * len(self.mean) // nodes - cut.start, 0)
            stop = (chunk + 1) * len(self.mean) // nodes - cut.start
            if start >= min(stop, len(mean)):
                continue
            total = mean[start:stop]
            first, *others = [each[start:stop] for each in values[chunk:] + values[:chunk]]
            if not others:
                total[:] = first
            for other in others:
                np.add(first, other, out=total)
                first = total
        self._spread_total(unit)
