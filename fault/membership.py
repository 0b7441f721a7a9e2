"""Membership as a pure state machine: boot, candidate, member, gone.

It decides who is in the view and who may start; it knows nothing of tensors, sockets or clocks.
The driver (or the simulator) feeds it snapshots of the registry, heartbeats and the time, and
carries out the actions it appends to `out`. What a step needs of a view is in `p2p/steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fault import actions
from fault.assignment import assign
from fault.candidates import Candidates
from fault.judgement import dissenters, removals
from fault.records import (
    Grant,
    Peer,
    Proposal,
    ProposalKind,
    Removal,
    Snapshot,
    Timing,
    View,
    generation_of,
    slot_of,
)
from fault.succession import lead_s
from fault.suspicion import Suspicion

Role = Literal["candidate", "member", "gone"]
Action = object


class Membership:
    """One peer's part in who is who.

    `new_id` draws fresh random ids (the only randomness). `adopt(view, now)` is called whenever
    this peer comes to live in a new view, `gone(reason)` is announced by an `actions.Exit`.
    """

    def __init__(
        self,
        me: Peer,
        shards: int,
        timing: Timing,
        new_id: Callable[[], str],
        out: list[Action],
        adopt: Callable[[View, float], None],
        predecessor: Peer = "",
        deadline: float = float("inf"),
    ) -> None:
        self.me = me
        self.slot = slot_of(me)
        self.shards = shards
        self.timing = timing
        self.new_id = new_id
        self.out = out
        self._adopt_steps = adopt
        self.predecessor = predecessor
        self.deadline = deadline
        self.role: Role = "candidate"
        self.view: View | None = None
        self.snapshot: Snapshot | None = None
        self.began = 0.0
        self.state_step = -1
        """Step of the state this peer holds, -1 for none; kept up to date by the core."""
        self.stalled = False
        """No step finishes although one is due; kept up to date by the core."""
        self.disagreement = False
        """Somebody computed from a different state of the same step."""
        self.suspicion = Suspicion(me, timing)
        self.candidates = Candidates(timing)
        self.boot_s: float | None = None
        """From the grant until this process could take part."""
        self.step_s = 0.0
        """The longest step of late; kept up to date by the core."""
        self._contact_since = float("inf")
        self._contact_life = ""
        self._no_evictions_until = 0.0
        self._wish_since: dict[str, float] = {}
        self._first_ready_at = float("inf")
        self._memberless_since = float("inf")
        self._view_sent: dict[Peer, float] = {}
        self._last_tick = 0.0
        self._loading = False
        self._invited_at = -float("inf")
        self.successor: Peer = ""

    # --- what comes in ----------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """The grant is claimed; from here on this process is a candidate."""
        self.began = self._last_tick = now

    def began_memberless(self, since: float, life: str, now: float) -> None:
        """While this process booted, the registry, in one `life`, showed no member since then.

        What is left to wait for is whether one answers over the relays.
        """
        heard_all_along = now - 2 * self.timing.lease_ttl_s + self.timing.unanswered_s
        self._memberless_since = max(since, heard_all_along)
        self._contact_life = life

    def on_beat(self, peer: Peer, view_number: int, now: float) -> None:
        self.suspicion.on_sign(peer, True, now)
        self.on_view_number(peer, view_number, now)

    def on_segment(self, peer: Peer, view_number: int, is_sign: bool, now: float) -> None:
        """`is_sign`: it was sent just now, so the peer lives."""
        if is_sign:
            self.suspicion.on_sign(peer, False, now)
        self.on_view_number(peer, view_number, now)

    def on_view_number(self, peer: Peer, number: int, now: float) -> None:
        """Somebody spoke from another view: a member tells it of a newer one."""
        if (
            self.role == "member"
            and self.view is not None
            and number < self.view.number
            and now - self._view_sent.get(peer, -1.0) >= self.timing.beat_s
        ):
            self._view_sent[peer] = now
            self.out.append(actions.PushView(self.view, (peer,)))
        if self.role == "candidate":
            self._memberless_since = float("inf")  # somebody answers over the relays

    def on_ready(self, peer: Peer, step: int, now: float) -> None:
        """A candidate is there; with a state of `step`, or -1 for none."""
        self.candidates.hear(peer, step, self.state_step, now)

    def on_view(self, view: View, now: float) -> None:
        """A member passed a view on."""
        if view.newer_than(self.view):
            self._enter(view, now)

    def on_contact_failed(self, now: float) -> None:
        """The registry did not answer: every clock that rests on its word starts again."""
        self._contact_since = float("inf")
        self._memberless_since = float("inf")

    def on_snapshot(self, snapshot: Snapshot, now: float) -> None:
        if self.role == "gone":
            return
        if snapshot.life != self._contact_life:
            self._contact_life = snapshot.life
            self._contact_since = self._memberless_since = float("inf")
        self._contact_since = min(self._contact_since, now)
        self.snapshot = snapshot
        if snapshot.outcome is not None:
            self.leave(snapshot.outcome.state)
        elif self.role == "candidate":
            self._as_candidate(snapshot, now)
        else:
            self._as_member(snapshot, now)

    def tick(self, now: float) -> None:
        """Every beat: who has fallen silent? Call it after the messages at hand were taken in."""
        late = now - self._last_tick - self.timing.beat_s
        self._last_tick = now
        if self.role == "candidate":
            if now - self.began > self.timing.join_timeout_s:
                self.leave("join timeout")
            return
        leased = self.snapshot.leased if self.snapshot is not None else frozenset()
        registry_is_sure = self.snapshot is not None and self._contact_is_unbroken(now)
        self.suspicion.tick(late, lambda peer: registry_is_sure and peer not in leased, now)
        self._invite_successor(now)

    def on_proposed(self, proposal: Proposal, accepted: bool, now: float) -> None:
        if not accepted or self.role == "gone":
            return
        old = self.view.members if self.view is not None else ()
        everyone = tuple(dict.fromkeys((*proposal.view.members, *old)))
        self.out.append(actions.PushView(proposal.view, tuple(p for p in everyone if p != self.me)))
        if proposal.view.newer_than(self.view):
            self._enter(proposal.view, now)

    def leave(self, reason: str, cause: str = "", blunt: bool = False) -> None:
        if self.role != "gone":
            self.role = "gone"
            self.out.append(actions.Exit(reason, cause, blunt))

    # --- views ------------------------------------------------------------------------------

    def _enter(self, view: View, now: float) -> None:
        if self.me not in view.members:
            if self.role == "member":
                handed_over = self.successor and self.successor in view.members
                self.leave("handed over" if handed_over else "evicted")
            elif self._replaced_in(view):
                self.leave("slot taken")
            return
        self.role = "member"
        self.view = view
        self._wish_since.clear()
        self.suspicion.watch(view.members, now)
        self.candidates.forget(view.members)
        self.disagreement = False
        self._adopt_steps(view, now)

    def _replaced_in(self, view: View) -> bool:
        occupant = view.member_in(self.slot)
        return occupant is not None and generation_of(occupant) >= generation_of(self.me)

    def _proposal(
        self,
        kind: ProposalKind,
        snapshot: Snapshot,
        members: list[Peer],
        gone: list[Removal] | None = None,
        players: tuple[Peer, ...] | None = None,
    ) -> actions.Propose:
        old = snapshot.view
        mine = self.view.number if self.view is not None else -1
        number = max(mine, snapshot.highest_view, old.number if old else -1) + 1
        slots = self._slots_for(members, snapshot)
        members = sorted(members, key=slot_of)
        view = View(
            number,
            self.new_id(),
            tuple(members),
            players or assign(self.shards, slots, members),
            slots,
        )
        return actions.Propose(
            Proposal(
                self.me,
                kind,
                old.number if old else -1,
                old.id if old else "",
                view,
                tuple(gone or ()),
            )
        )

    def _slots_for(self, members: list[Peer], snapshot: Snapshot) -> int:
        """N of a view: what is wished for, or more while a member above that has to stay."""
        wished = snapshot.target_slots or (self.view.slots if self.view else 1)
        return max(wished, *[slot_of(peer) + 1 for peer in members])

    def my_turn(self, wish: str, rank: int, now: float) -> bool:
        """True when this wish has stood for `rank` delays: the first in rank acts alone."""
        since = self._wish_since.setdefault(wish, now)
        return now - since >= rank * self.timing.rank_delay_s

    def _unwish(self, wish: str) -> None:
        self._wish_since.pop(wish, None)

    # --- candidate --------------------------------------------------------------------------

    def _as_candidate(self, snapshot: Snapshot, now: float) -> None:
        view, grant = snapshot.view, snapshot.grants.get(self.slot)
        if self.boot_s is None and grant is not None and grant.claimant == self.me:
            self.boot_s = snapshot.now - grant.granted_at
        if view is not None and self.me in view.members:
            self._enter(view, now)
        elif grant is None or grant.claimant != self.me:
            self.leave("superseded" if grant is not None else "the registry lost the grant")
        elif self.slot >= snapshot.target_slots or (view is not None and self._replaced_in(view)):
            self.leave("slot taken")
        elif view is None and snapshot.life == snapshot.born and snapshot.highest_view < 0:
            self._propose_first(snapshot, now)
        else:
            self._revive(snapshot, now)

    def _propose_first(self, snapshot: Snapshot, now: float) -> None:
        """The run's first view waits for every slot, or for the boot window to end."""
        if self.state_step < 0:
            self._load()
            return
        wanted = [peer for peer in snapshot.ready if slot_of(peer) < snapshot.target_slots]
        ready = sorted(wanted, key=slot_of)
        if self.me not in ready:
            return
        self._first_ready_at = min(self._first_ready_at, now)
        complete = len({slot_of(peer) for peer in ready}) >= snapshot.target_slots
        if complete or now - self._first_ready_at >= self.timing.boot_window_s:
            if self.my_turn("first", ready.index(self.me), now):
                self.out.append(self._proposal("first", snapshot, ready))
        else:
            self._unwish("first")

    def _revive(self, snapshot: Snapshot, now: float) -> None:
        """When no member is left, whoever starts may bring the run back."""
        members = snapshot.view.members if snapshot.view is not None else ()
        if any(peer in snapshot.leased for peer in members):
            self._memberless_since = float("inf")
            return
        self._memberless_since = min(self._memberless_since, now)
        if now - self._memberless_since < 2 * self.timing.lease_ttl_s:
            return
        if self.state_step < 0:
            self._load()
            return
        waiting = sorted((p for p in snapshot.ready if p in snapshot.leased), key=slot_of)
        rank = waiting.index(self.me) if self.me in waiting else len(waiting)
        if self.my_turn("revive", rank, now):
            gone = [Removal(peer, "lease") for peer in members]
            self.out.append(self._proposal("revive", snapshot, [self.me], gone))

    def _load(self) -> None:
        if not self._loading:
            self._loading = True
            self.out.append(actions.LoadCheckpoint())

    # --- member -----------------------------------------------------------------------------

    def _as_member(self, snapshot: Snapshot, now: float) -> None:
        view = self.view
        assert view is not None
        theirs = snapshot.view
        if theirs is None or theirs.number < view.number:
            self._write_back(view, snapshot, now)
            return
        self._unwish("restore")
        if (theirs.number, theirs.id) != (view.number, view.id):
            self._enter(theirs, now)
            return
        if self.disagreement and not self._settle_disagreement(view, snapshot, now):
            return
        self._change_view(view, snapshot, now)
        self._grant_empty_slots(view, snapshot, now)

    def _write_back(self, view: View, snapshot: Snapshot, now: float) -> None:
        """The registry is older than what the members know: tell it, as a new view."""
        self._no_evictions_until = now + self.timing.lease_ttl_s
        if self.my_turn("restore", view.members.index(self.me), now):
            self._unwish("restore")
            self.out.append(
                self._proposal("restore", snapshot, list(view.members), players=view.players)
            )

    def _settle_disagreement(self, view: View, snapshot: Snapshot, now: float) -> bool:
        minority, has_majority = dissenters(view, snapshot, self.state_step)
        if minority and (not has_majority or self.me in minority):
            self.leave("corrupt")
            return False
        for peer in minority:
            self.suspicion.accuse(peer, "corrupt", now)
        return True

    def _contact_is_unbroken(self, now: float) -> bool:
        return now - self._contact_since >= self.timing.lease_ttl_s

    def _change_view(self, view: View, snapshot: Snapshot, now: float) -> None:
        gone = (
            removals(view, snapshot, self.me, self._contact_is_unbroken(now), self.stalled)
            if now >= self._no_evictions_until
            else []
        )
        leaving = {removal.peer for removal in gone}
        staying = [peer for peer in view.members if peer not in leaving]
        taken = {slot_of(peer) for peer in staying}
        joining: list[Peer] = []
        for slot, grant in snapshot.grants.items():
            candidate = grant.claimant
            if (
                slot < snapshot.target_slots
                and slot not in taken
                and candidate in snapshot.leased
                and candidate not in view.members
                and candidate not in snapshot.departed
                and self.candidates.may_join(candidate, now)
            ):
                joining.append(candidate)
        scaled = self._slots_for(staying + joining, snapshot) != view.slots
        surplus = self.slot >= snapshot.target_slots > 0
        if surplus and any(slot_of(peer) < snapshot.target_slots for peer in staying):
            return  # somebody who stays will propose it
        if not (gone or joining or scaled):
            self._unwish("change")
            return
        if self.my_turn("change", staying.index(self.me), now):
            self.out.append(self._proposal("change", snapshot, staying + joining, gone))

    def _grant_empty_slots(self, view: View, snapshot: Snapshot, now: float) -> None:
        taken = {slot_of(peer) for peer in view.members}
        for slot in range(snapshot.target_slots):
            wish = f"grant {slot}"
            if slot in taken or not self._open(snapshot.grants.get(slot), snapshot):
                self._unwish(wish)
            elif self.my_turn(wish, view.members.index(self.me), now):
                self._unwish(wish)
                last = snapshot.grants.get(slot)
                generation = (last.generation if last else 0) + 1
                self.out.append(actions.GrantSlot(slot, generation, self.new_id()))

    def _open(self, grant: Grant | None, snapshot: Snapshot) -> bool:
        """Nobody holds the slot's newest grant, and its back-off is over."""
        timing, now = self.timing, snapshot.now
        if grant is None:
            return True
        if grant.claimant:
            if grant.claimant in snapshot.leased:
                return now >= grant.claimed_at + timing.join_timeout_s
            if (
                now < grant.claimed_at + timing.lease_ttl_s
                and grant.claimant not in snapshot.departed
                and grant.fails >= 0
            ):
                return False
        elif now < grant.expires_at:
            return False
        # doubled from the second failure on; a slot that held a member starts afresh
        wait = timing.regrant_base_s * 2.0 ** min(grant.fails, 16) if grant.fails >= 0 else 0.0
        return now >= max(grant.granted_at, grant.claimed_at) + min(wait, timing.regrant_cap_s)

    # --- hand-over --------------------------------------------------------------------------

    def _invite_successor(self, now: float) -> None:
        """In time before the deadline, grant the own slot's next generation."""
        view, snapshot = self.view, self.snapshot
        if view is None or snapshot is None:
            return
        life_s = self.deadline - self.began
        alone = len(view.members) == 1
        boot_s = self.boot_s or 0.0
        lead = lead_s(self.timing, boot_s, self.step_s, life_s, self.slot, view.slots, alone)
        if lead < 0 or now < self.deadline - lead:
            return
        grant = snapshot.grants.get(self.slot)
        if grant is None or now - self._invited_at < self.timing.regrant_base_s + 1.0:
            return
        succession = grant.claimant == self.me
        if succession or self._open(grant, snapshot):
            self._invited_at = now
            self.out.append(
                actions.GrantSlot(self.slot, grant.generation + 1, self.new_id(), self.me)
            )

    def ready_successor(self, now: float) -> Peer:
        """The claimant of this slot's next generation, if it was heard just now; else ''."""
        snapshot = self.snapshot
        grant = snapshot.grants.get(self.slot) if snapshot is not None else None
        if grant is None or not grant.claimant or grant.generation <= generation_of(self.me):
            return ""
        return grant.claimant if self.candidates.is_there(grant.claimant, now) else ""

    def propose_swap(self, successor: Peer) -> bool:
        """The successor holds the state: put it into the view in this peer's place.

        False when this cannot be proposed yet: the registry shows another view than this peer's.
        """
        view, snapshot = self.view, self.snapshot
        if view is None or snapshot is None or snapshot.view != view:
            return False
        members = [successor if peer == self.me else peer for peer in view.members]
        players = tuple(successor if peer == self.me else peer for peer in view.players)
        self.out.append(
            self._proposal("change", snapshot, members, [Removal(self.me, "swap")], players)
        )
        return True
