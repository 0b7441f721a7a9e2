"""The plain data of membership: peers, views, grants, and what a registry answers.

Nothing here decides anything; `membership.py` decides and `ledger.py` keeps the records. A peer is
named by a string ``slot.generation.nonce``: the generation counts a slot's grants, the nonce is
drawn by the process that claims one, so no two processes ever share a name. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

Peer = str
"""``slot.generation.nonce``; also the peer's address on the relays."""

AccusationKind = Literal["silent", "unreachable", "hung", "corrupt"]
RemovalKind = Literal["silent", "lease", "hung", "unreachable", "corrupt", "left", "swap", "scaled"]
ProposalKind = Literal["change", "restore", "revive", "first"]
OutcomeState = Literal["finished", "failed", "stopped"]


def peer_name(slot: int, generation: int, nonce: str) -> Peer:
    return f"{slot}.{generation}.{nonce}"


@lru_cache(maxsize=4096)
def slot_of(peer: Peer) -> int:
    return int(peer.split(".", 1)[0])


@lru_cache(maxsize=4096)
def generation_of(peer: Peer) -> int:
    return int(peer.split(".", 2)[1])


@dataclass(frozen=True, slots=True)
class View:
    """A membership: which peers there are, and which of them plays each shard.

    Views are told apart by (number, id): a registry that lost its last second could otherwise hand
    out one number twice. `players[v]` is the peer that plays shard v; `slots` is N.
    """

    number: int
    id: str
    members: tuple[Peer, ...]
    players: tuple[Peer, ...]
    slots: int

    def member_in(self, slot: int) -> Peer | None:
        for peer in self.members:
            if slot_of(peer) == slot:
                return peer
        return None

    def shards_of(self, peer: Peer) -> list[int]:
        return [shard for shard, player in enumerate(self.players) if player == peer]

    def newer_than(self, other: View | None) -> bool:
        return other is None or self.number > other.number


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to start one process for a slot; claimed once, by the process that runs it."""

    slot: int
    generation: int
    token: str
    granted_at: float
    expires_at: float
    claimant: Peer = ""
    claimed_at: float = 0.0
    fails: int = 0
    """How many grants of this slot in a row led to no member; drives the back-off."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What a peer last said it was at; the registry keeps it for the count of poisoned shards."""

    step: int = -1
    digest: str = ""
    computing: int = -1
    """The shard whose contribution is being computed, or -1."""
    near_deadline: bool = False
    """True when a death now would be the time limit's doing and proves nothing about the shard."""


@dataclass(frozen=True, slots=True)
class Accusation:
    accuser: Peer
    accused: Peer
    kind: AccusationKind


@dataclass(frozen=True, slots=True)
class Removal:
    """One member that a proposed view leaves out, and the ground for it."""

    peer: Peer
    kind: RemovalKind


@dataclass(frozen=True, slots=True)
class Death:
    """A peer that died while it computed a shard's contribution."""

    peer: Peer
    at: float
    claimed_at: float
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A (shard, step) that peers died of."""

    shard: int
    step: int
    deaths: tuple[Death, ...]

    @property
    def convicted(self) -> bool:
        """Three peers died of it, and then one that was started after the third death."""
        third = 2
        return len(self.deaths) > third and any(
            death.claimed_at > self.deaths[third].at for death in self.deaths[third + 1 :]
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `error` is the name of a class in `fault.errors` when it failed."""

    state: OutcomeState
    step: int
    digest: str = ""
    error: str = ""
    reason: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the registry answers to a contact: all that a peer ever needs of it."""

    life: str
    """Changes when the registry's server was restarted."""
    born: str
    """The life in which the run was created; equal to `life` while nothing can have been lost."""
    now: float
    view: View | None
    leased: frozenset[Peer]
    ready: dict[Peer, int]
    """Candidates that hold a lease and a state, with its step."""
    accusations: tuple[Accusation, ...]
    grants: dict[int, Grant]
    doing: dict[Peer, Doing]
    departed: frozenset[Peer]
    """Peers that said they leave; they hold no lease any more."""
    suspects: tuple[Suspect, ...]
    outcome: Outcome | None
    checkpoint: int
    """Newest durable checkpoint's step, or -1."""
    target_slots: int
    highest_view: int
    """The highest view number this registry has seen, -1 for none."""

    def is_quiet(self, view: View) -> bool:
        """Whether this is the view, every slot of it is filled by a member with a lease, and
        nobody else is on the way, accused or suspected."""
        members = view.members
        return (
            self.view is not None
            and (self.view.number, self.view.id) == (view.number, view.id)
            and len(members) == self.target_slots
            and self.leased.issuperset(members)
            and all(
                grant.claimant in members or slot >= self.target_slots
                for slot, grant in self.grants.items()
            )
            and not (self.accusations or self.suspects)
            and self.outcome is None
        )


@dataclass(frozen=True, slots=True)
class Contact:
    """What a peer tells the registry."""

    peer: Peer
    doing: Doing = field(default_factory=Doing)
    ready: int = -1
    """A candidate's state's step, or -1 when it holds none (members: ignored)."""
    accusations: tuple[tuple[Peer, AccusationKind], ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """One compare-and-set of the view: every change at once."""

    proposer: Peer
    kind: ProposalKind
    expected_number: int
    """Number of the view it replaces, -1 for none."""
    expected_id: str
    view: View
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Every duration of the membership protocol, in seconds."""

    beat_s: float = 0.1
    lease_ttl_s: float = 2.0
    accusation_ttl_s: float = 0.6
    rank_delay_s: float = 0.15
    candidate_beat_s: float = 0.2
    ready_ttl_s: float = 0.5
    grant_ttl_s: float = 30.0
    """An unclaimed grant may be replaced after this: a lost invocation."""
    join_timeout_s: float = 120.0
    boot_window_s: float = 20.0
    """The first view waits this long, from the first ready candidate, for the other slots."""
    regrant_base_s: float = 0.2
    regrant_cap_s: float = 30.0
    ask_s: float = 0.1
    unanswered_s: float = 1.0
    """An asked peer that says nothing for so long is 'unreachable'."""
    patience_s: float = 30.0
    """How long one shard's contribution may show no progress before its peer counts as hung."""
    handover_margin_s: float = 2.0
    """A successor is invited so much earlier than a start takes; negative: never."""
    handover_stagger: float = 1.0
    """How far the slots' hand-overs are spread, so that starts do not coincide; 0: not at all."""
    handover_ack_s: float = 0.8
    """A successor that does not get on for so long is not waited for."""
    deadline_slack_s: float = 0.5
    """A death so close to the deadline is the time limit's doing."""
