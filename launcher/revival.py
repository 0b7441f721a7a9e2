"""What keeps a run going, or ends it, when none of its members can: pure decisions.

The supervisor asks twice a second what to do. Anyone may revive a run that has no member left;
a run whose functions die before they can join, again and again, is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fault.records import Outcome, Peer, Snapshot, Timing

BOOTS_PER_SLOT = 3
"""Boots that fail in a row, for each slot, before the run is given up."""


def open_slots(snapshot: Snapshot, timing: Timing) -> list[tuple[int, int]]:
    """(slot, next generation) of every slot whose newest grant nobody holds or can still claim."""
    found = []
    for slot in range(snapshot.target_slots):
        grant = snapshot.grants.get(slot)
        if grant is None:
            found.append((slot, 1))
            continue
        held = grant.claimant in snapshot.leased if grant.claimant else False
        fresh = snapshot.now < (
            grant.claimed_at + timing.lease_ttl_s if grant.claimant else grant.expires_at
        )
        if not held and (not fresh or grant.claimant in snapshot.departed):
            found.append((slot, grant.generation + 1))
    return found


@dataclass(slots=True)
class Revival:
    """Watches for a run without members. `now` is any clock that only goes forward."""

    timing: Timing
    _memberless_since: float = field(default=float("inf"))
    _all_died: bool = False

    def platform_died(self) -> None:
        """All functions ran in it, so whoever still holds a lease is dead."""
        self._all_died = True

    def outage(self) -> None:
        """The registry did not answer: what it said before no longer counts."""
        self._memberless_since = float("inf")

    def slots_to_grant(self, snapshot: Snapshot, now: float) -> list[tuple[int, int]]:
        members = snapshot.view.members if snapshot.view is not None else ()
        if snapshot.outcome is not None or any(peer in snapshot.leased for peer in members):
            if self._memberless_since < float("inf"):
                self._all_died = False  # these members came after
            self._memberless_since = float("inf")
            return []
        self._memberless_since = min(self._memberless_since, now)
        departed = bool(members) and all(peer in snapshot.departed for peer in members)
        if (
            not departed
            and not self._all_died
            and now - self._memberless_since < 3 * self.timing.lease_ttl_s
        ):
            return []
        return open_slots(snapshot, self.timing)


@dataclass(slots=True)
class Boots:
    """Counts the boots that failed since a peer last joined."""

    _failed: set[str] = field(default_factory=set)
    _joined: set[Peer] = field(default_factory=set)
    _error: str = "BootFailed"
    _reason: str = ""
    _trace: str = ""

    def joined(self, members: tuple[Peer, ...]) -> None:
        if not self._joined.issuperset(members):
            self._joined.update(members)
            self._failed.clear()

    def failed(self, name: str, reason: str, error: str = "BootFailed", trace: str = "") -> None:
        """`name` is a peer, or "slot.generation"; one that joined before did not fail to boot."""
        prefix = ".".join(name.split(".")[:2]) + "."
        if not any(peer.startswith(prefix) for peer in self._joined):
            self._failed.add(prefix)
            if error != "BootFailed" or self._error == "BootFailed":
                self._error, self._reason, self._trace = error, reason, trace

    def verdict(self, slots: int, members_left: bool) -> Outcome | None:
        """How the run ends, if it is to be given up."""
        if members_left or len(self._failed) < BOOTS_PER_SLOT * max(1, slots):
            return None
        reason = f"{len(self._failed)} functions in a row ended before they joined: {self._reason}"
        return Outcome("failed", -1, "", self._error, reason, self._trace)


@dataclass(slots=True)
class Standstill:
    """Counts the peers that the platform saw die since a new step was last reached.

    The registry counts what peers died of by (shard, step), out of their last beat, which in a
    fast job is that of an earlier step. The platform's word needs no such guess; what it cannot
    tell is who meant to kill a process, so crashes need to be many.
    """

    _peers: dict[Peer, str] = field(default_factory=dict)
    _step: int = -1

    def died(self, peer: Peer, cause: str, step: int) -> None:
        """`step` is the newest that any peer has reached."""
        if step > self._step:
            self._step = step
            self._peers.clear()
        self._peers[peer] = cause

    def verdict(self, slots: int, step: int) -> Outcome | None:
        """How the run ends once too many got no further.

        Of memory, every slot's peer and two more; of crashes, twice as many and two more.
        """
        if step > self._step:
            return None
        starved = list(self._peers.values()).count("out of memory")
        if starved >= slots + 2:
            reason = (
                f"step {step} needs more memory than a function has: {starved} peers in a row ran "
                "out of it there; give them more with --memory, or play more shards"
            )
            return Outcome("failed", step, "", "OutOfMemory", reason)
        if len(self._peers) >= 2 * slots + 4:
            reason = (
                f"the processes of {len(self._peers)} peers in a row ended before step {step + 1} "
                "was reached, without saying of what; 'p2p-launch logs' has what they wrote"
            )
            return Outcome("failed", step, "", "Poisoned", reason)
        return None
