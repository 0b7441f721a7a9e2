"""What happened in a run, slot by slot, as plain data. Times are seconds since it was created."""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import Peer

HANDOVER = "hand-over"


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time in which a peer played the same shards."""

    start_s: float
    end_s: float
    home: tuple[int, ...]
    """Those of its slot's home block."""
    adopted: tuple[int, ...]
    """Those beyond it."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One function in a slot, from its grant to its end."""

    slot: int
    generation: int
    peer: Peer
    """Empty when nobody claimed the grant."""
    start: str
    """cold, warm or restored; empty when it never said."""
    granted_s: float
    joined_s: float | None
    """When a view named it first."""
    ended_s: float
    """For one that still runs, the end of what is known."""
    ending: str
    stretches: tuple[Stretch, ...]

    @property
    def boot_s(self) -> float | None:
        """From its grant to the view that named it."""
        return None if self.joined_s is None else self.joined_s - self.granted_s

    @property
    def shards(self) -> tuple[int, ...]:
        """All that it ever played."""
        played = {shard for each in self.stretches for shard in each.home + each.adopted}
        return tuple(sorted(played))

    @property
    def adopted(self) -> tuple[int, ...]:
        """All that it ever played beyond its home block."""
        return tuple(sorted({shard for each in self.stretches for shard in each.adopted}))


@dataclass(frozen=True, slots=True)
class Incident:
    """A hand-over or a death."""

    at_s: float
    """Of a death, when it happened as far as that is known: on request or with a word at that time,
    otherwise with the last step that was finished before it was noticed."""
    kind: str
    """`HANDOVER`, or the ground on which the others removed a dead peer."""
    peer: Peer
    shards: tuple[int, ...]
    """What it played."""
    heirs: tuple[Peer, ...]
    """Who played that afterwards; of a hand-over, the successor."""
    stall_ms: float | None
    """None when no step was finished before it, or none after it."""
    gap_s: tuple[float, float] | None
    """When the last step before it and the first after it were reached."""
    note: str = ""

    @property
    def death(self) -> bool:
        return self.kind != HANDOVER


@dataclass(frozen=True, slots=True)
class Scaling:
    """From here on the run has so many slots."""

    at_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning: a relay or a registry that was away, an invocation that failed, …"""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    at_s: float
    step: int
    values: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Loss:
    at_s: float
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class History:
    """All that a report shows."""

    state: str
    reason: str
    digest: str
    lanes: int
    """As many as there ever were slots."""
    shards: int
    end_s: float
    step: int
    repeated_steps: int
    """Computed again after all peers died at once; 0 as long as anyone lived."""
    step_s: float
    """The median time of a step."""
    checkpoints: int
    views: int
    invocations: tuple[Invocation, ...]
    """In the order of slots and generations."""
    incidents: tuple[Incident, ...]
    scalings: tuple[Scaling, ...]
    notices: tuple[Notice, ...]
    evaluations: tuple[Evaluation, ...]
    losses: tuple[Loss, ...]

    @property
    def handovers(self) -> int:
        return sum(not each.death for each in self.incidents)

    @property
    def deaths(self) -> int:
        return sum(each.death for each in self.incidents)
