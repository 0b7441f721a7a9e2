"""The registry's rules, as pure data and functions over it.

Every operation checks its own preconditions and either happens whole or not at all, so a doubled,
late or outdated call does no harm. `fault/registry.py` runs the same rules as server-side scripts
in a Redis-protocol server; the simulator runs this class; one test holds the two together by
random sequences of calls. `now` is the server's clock in seconds.
"""

from __future__ import annotations

from dataclasses import replace

from fault.records import (
    Accusation,
    AccusationKind,
    Contact,
    Death,
    Doing,
    Grant,
    Outcome,
    Peer,
    Proposal,
    Snapshot,
    Suspect,
    Timing,
    View,
    generation_of,
    slot_of,
)

SUSPECTS_LIMIT = 64
CRASHES = frozenset({"silent", "lease"})


class Ledger:
    """One run's records."""

    def __init__(self, timing: Timing, life: str = "0") -> None:
        self.timing = timing
        self.life = life
        self.born = ""
        self.spec = ""
        self.view: View | None = None
        self.highest_view = -1
        self.target_slots = 0
        self.leases: dict[Peer, float] = {}
        self.ready: dict[Peer, int] = {}
        self.doing: dict[Peer, Doing] = {}
        self.departed: dict[Peer, str] = {}
        self.grants: dict[int, Grant] = {}
        self.accusations: dict[tuple[Peer, Peer], tuple[AccusationKind, float]] = {}
        self.suspects: dict[tuple[int, int], Suspect] = {}
        self.outcome: Outcome | None = None
        self.checkpoint = -1
        self.probe = ""

    # --- the launcher -----------------------------------------------------------------------

    def create(self, spec: str, slots: int) -> bool:
        """Makes the run, once; False when it is there already."""
        if self.spec:
            return False
        self.spec, self.born, self.target_slots = spec, self.life, slots
        return True

    def scale(self, slots: int) -> bool:
        if self.outcome is not None or not self.spec:
            return False
        self.target_slots = slots
        return True

    def reopen(self) -> bool:
        """Lets a run go on that failed, was stopped, or lost all its processes at once.

        To be called by who knows that none of its processes lives. False for a run that is
        finished, or not there.
        """
        if not self.spec or (self.outcome is not None and self.outcome.state == "finished"):
            return False
        self.outcome = None
        for records in (self.suspects, self.accusations, self.leases, self.ready):
            records.clear()
        return True

    # --- leases -----------------------------------------------------------------------------

    def leased(self, peer: Peer, now: float) -> bool:
        return self.leases.get(peer, 0.0) > now

    def may_hold_lease(self, peer: Peer) -> bool:
        """Members, and the claimants of the newest grant of a slot."""
        if peer in self.departed:
            return False
        if self.view is not None and peer in self.view.members:
            return True
        grant = self.grants.get(slot_of(peer))
        return grant is not None and grant.claimant == peer

    def contact(self, contact: Contact, now: float) -> Snapshot:
        """Renews the caller's lease, if it may hold one, and answers with everything."""
        peer = contact.peer
        if self.may_hold_lease(peer):
            self.leases[peer] = now + self.timing.lease_ttl_s
            self.doing[peer] = contact.doing
            if contact.ready >= 0:
                self.ready[peer] = contact.ready
            if self.view is not None and peer in self.view.members:
                for accused, kind in contact.accusations:
                    self.accusations[(peer, accused)] = (
                        kind,
                        now + self.timing.accusation_ttl_s,
                    )
                self._acquit(contact.doing.step)
        return self.read(now)

    def read(self, now: float) -> Snapshot:
        for peer in [p for p, until in self.leases.items() if until <= now]:
            del self.leases[peer]
            self.ready.pop(peer, None)
        for pair in [p for p, (_, until) in self.accusations.items() if until <= now]:
            del self.accusations[pair]
        return Snapshot(
            life=self.life,
            born=self.born,
            now=now,
            view=self.view,
            leased=frozenset(self.leases),
            ready=dict(self.ready),
            accusations=tuple(
                [Accusation(a, b, kind) for (a, b), (kind, _) in self.accusations.items()]
            ),
            grants=dict(self.grants),
            doing=dict(self.doing),
            departed=frozenset(self.departed),
            suspects=tuple(self.suspects.values()),
            outcome=self.outcome,
            checkpoint=self.checkpoint,
            target_slots=self.target_slots,
            highest_view=self.highest_view,
        )

    # --- grants -----------------------------------------------------------------------------

    def grant_is_open(self, slot: int, now: float) -> bool:
        """True when nobody holds, or may still claim, the newest grant of a slot."""
        grant = self.grants.get(slot)
        if grant is None:
            return True
        if not grant.claimant:
            return now >= grant.expires_at
        if not self.leased(grant.claimant, now):
            # a fresh claimant has had no time to make contact yet
            return now >= grant.claimed_at + self.timing.lease_ttl_s or (
                grant.claimant in self.departed or grant.fails < 0
            )
        member = self.view is not None and grant.claimant in self.view.members
        return not member and now >= grant.claimed_at + self.timing.join_timeout_s

    def grant(self, slot: int, generation: int, token: str, by: Peer, now: float) -> bool:
        """Gives out a slot's next generation. A member may also grant its own slot's successor."""
        if self.outcome is not None or not 0 <= slot < self.target_slots:
            return False
        last = self.grants.get(slot)
        if generation != (last.generation if last else 0) + 1:
            return False
        members = self.view.members if self.view is not None else ()
        occupant = self.view.member_in(slot) if self.view is not None else None
        if occupant is not None and by != occupant and any(self.leased(p, now) for p in members):
            return False  # a view with a living member is changed first, then the slot is free
        succession = occupant is not None and by == occupant == (last.claimant if last else "")
        if not succession and not self.grant_is_open(slot, now):
            return False
        fails = 0 if last is None or succession or last.fails < 0 else last.fails + 1
        self.grants[slot] = Grant(
            slot, generation, token, now, now + self.timing.grant_ttl_s, fails=fails
        )
        return True

    def claim(self, slot: int, generation: int, token: str, peer: Peer, now: float) -> bool:
        """Takes a grant for this process: same generation and token, unclaimed, in time."""
        grant = self.grants.get(slot)
        if (
            self.outcome is not None
            or grant is None
            or (grant.generation, grant.token) != (generation, token)
            or grant.claimant
            or now >= grant.expires_at
        ):
            return False
        self.grants[slot] = replace(grant, claimant=peer, claimed_at=now)
        self.leases[peer] = now + self.timing.lease_ttl_s
        return True

    def admit_hardware(self, probe: str) -> str:
        """The first candidate's probe becomes the run's; returns the run's."""
        self.probe = self.probe or probe
        return self.probe

    # --- views ------------------------------------------------------------------------------

    def propose(self, proposal: Proposal, now: float) -> bool:
        """Replaces the view if everything the proposal rests on still holds."""
        new, old = proposal.view, self.view
        current = (old.number, old.id) if old is not None else (-1, "")
        if self.outcome is not None or not self.spec:
            return False
        if current != (proposal.expected_number, proposal.expected_id):
            return False
        if new.number <= self.highest_view or proposal.proposer in self.departed:
            return False
        if proposal.kind == "restore":
            self._regain(new, now)
        elif not self._grounds_hold(proposal, now):
            return False
        self._install(proposal, now)
        return True

    def restore(self, spec: str, slots: int, proposal: Proposal, now: float) -> bool:
        """Members write back what a registry lost: the spec, if it has none, and their view."""
        if not self.spec:
            self.spec, self.born, self.target_slots = spec, "", slots
        return self.propose(proposal, now)

    def _grounds_hold(self, proposal: Proposal, now: float) -> bool:
        new, old = proposal.view, self.view
        before = old.members if old is not None else ()
        reasons = {removal.peer: removal.kind for removal in proposal.removals}
        if proposal.kind == "first" and old is not None:
            return False
        if proposal.kind == "revive":
            if any(self.leased(peer, now) for peer in before):
                return False
        elif proposal.kind == "change":
            if proposal.proposer not in before:
                return False
            for peer in before:
                if peer not in new.members and not self._may_remove(
                    peer, reasons.get(peer, ""), proposal, now
                ):
                    return False
        for peer in new.members:
            if peer in before:
                continue
            grant = self.grants.get(slot_of(peer))
            if grant is None or grant.claimant != peer or not self.leased(peer, now):
                return False
        return True

    def _may_remove(self, peer: Peer, kind: str, proposal: Proposal, now: float) -> bool:
        if kind == "swap":
            return proposal.proposer == peer
        if kind == "scaled":
            return slot_of(peer) >= proposal.view.slots
        if kind == "left":
            return peer in self.departed
        if kind == "lease":
            return not self.leased(peer, now)
        return any(
            accused == peer and until > now for (_, accused), (_, until) in self.accusations.items()
        )

    def _regain(self, view: View, now: float) -> None:
        """After a loss: the members' own word re-establishes their leases and grants."""
        for peer in view.members:
            slot = slot_of(peer)
            grant = self.grants.get(slot)
            if grant is None or grant.generation <= generation_of(peer):
                self.grants[slot] = Grant(
                    slot, generation_of(peer), "", now, now, claimant=peer, claimed_at=now, fails=-1
                )
            self.leases.setdefault(peer, now + self.timing.lease_ttl_s)
        self.target_slots = self.target_slots or view.slots

    def _install(self, proposal: Proposal, now: float) -> None:
        new, before = proposal.view, self.view.members if self.view is not None else ()
        for removal in proposal.removals:
            if removal.kind in CRASHES and removal.peer in before:
                self._suspect(removal.peer, self.departed.get(removal.peer, ""), now)
        if proposal.kind == "revive":
            for peer in before:
                if peer not in self.departed:
                    self._suspect(peer, "", now)
        for peer in before:
            if peer not in new.members:
                self._forget(peer)
        for peer in new.members:
            grant = self.grants.get(slot_of(peer))
            if grant is not None and grant.claimant == peer:
                self.grants[slot_of(peer)] = replace(grant, fails=-1)  # it led to a member
            self.ready.pop(peer, None)
        self.view = new
        self.highest_view = new.number

    def _forget(self, peer: Peer) -> None:
        self.leases.pop(peer, None)
        self.ready.pop(peer, None)
        self.doing.pop(peer, None)
        self.departed.pop(peer, None)
        for pair in [p for p in self.accusations if peer in p]:
            del self.accusations[pair]

    # --- deaths that mean something ---------------------------------------------------------

    def _suspect(self, peer: Peer, cause: str, now: float) -> None:
        doing = self.doing.get(peer)
        if doing is None or doing.computing < 0 or doing.near_deadline:
            return
        key = (doing.computing, doing.step)
        if key not in self.suspects and len(self.suspects) >= SUSPECTS_LIMIT:
            return
        suspect = self.suspects.get(key, Suspect(*key, deaths=()))
        if all(death.peer != peer for death in suspect.deaths):
            grant = self.grants.get(slot_of(peer))
            claimed_at = grant.claimed_at if grant and grant.claimant == peer else 0.0
            death = Death(peer, now, claimed_at, cause)
            self.suspects[key] = replace(suspect, deaths=(*suspect.deaths, death))

    def _acquit(self, step: int) -> None:
        """A finished step clears its shards."""
        for key in [k for k in self.suspects if k[1] < step]:
            del self.suspects[key]

    def leave(self, peer: Peer, cause: str, now: float) -> None:
        """A peer says that it goes, and of what; it holds no lease from here on."""
        if not self.may_hold_lease(peer):
            return
        if cause:
            self._suspect(peer, cause, now)
        self.leases.pop(peer, None)
        self.ready.pop(peer, None)
        self.departed[peer] = cause

    def blame(self, peer: Peer, cause: str) -> None:
        """The platform's word on what a peer died of ("out of memory", …)."""
        for key, suspect in self.suspects.items():
            self.suspects[key] = replace(
                suspect,
                deaths=tuple(
                    replace(death, cause=death.cause or cause) if death.peer == peer else death
                    for death in suspect.deaths
                ),
            )

    # --- the end ----------------------------------------------------------------------------

    def checkpointed(self, step: int) -> None:
        self.checkpoint = max(self.checkpoint, step)

    def finish(self, outcome: Outcome) -> Outcome:
        """Sets how the run ended; the first word stands and is returned."""
        self.outcome = self.outcome or outcome
        return self.outcome
