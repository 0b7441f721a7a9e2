"""A peer's process in the simulator: the real core, with a driver in virtual time.

It keeps the contract of `p2p/peer.py`: a tick each beat, one call of the registry at a time, jobs
of the computing thread one after another, everything the core asks for carried out in order.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from chaos.training import apply, digest_of
from fault import actions
from fault.ledger import Ledger
from fault.records import Contact, Peer, generation_of, slot_of
from p2p.actions import Apply, Compute, LoadState, Send, TakeImage, WritePieces
from p2p.boot import BootWatch
from p2p.collectives.memory import Vector
from p2p.core import Core
from p2p.messages import ViewIs

if TYPE_CHECKING:
    from chaos.world import World

BOOT_S = (0.4, 1.0)
COMPUTE_S = (0.04, 0.08)
CHECKPOINT_EVERY = 3


class SimulatedPeer:
    """Born when its event arrives; `alive` until its process ends."""

    def __init__(self, world: World, me: Peer, predecessor: Peer, time_limit_s: float) -> None:
        self.world = world
        self.me = me
        self.slot = slot_of(me)
        self.alive = True
        self.hung = False
        self.paused = False
        self.step = -1
        self.state = b""
        self.digest = ""
        self.core = Core(
            me,
            world.reference.shape,
            world.timing,
            world.new_id,
            CHECKPOINT_EVERY,
            predecessor=predecessor,
            deadline=world.now + time_limit_s,
        )
        self.core.steps.underway = self
        self.core_runs = False
        self._boot_watch = BootWatch()
        self.registry_unbroken_since = world.now
        self._progress = 0
        self._jobs: deque[object] = deque()
        self._working = False
        self._stood_still: list[tuple[Any, ...]] = []
        self._decisions: deque[actions.Propose | actions.GrantSlot | actions.Finish] = deque()
        self._contact: Contact | None = None
        self._asking = False
        self._lost_grants: dict[str, actions.GrantSlot] = {}
        self._moved_at = world.now
        self._handed_out: tuple[Compute, Vector] | None = None
        if time_limit_s < 1e9:
            world.after(time_limit_s, lambda: self.die("reached its time limit"))

    # --- life -------------------------------------------------------------------------------

    def claim(self, token: str, crashes: bool) -> None:
        def question(ledger: Ledger, now: float) -> bool:
            taken = ledger.claim(self.slot, generation_of(self.me), token, self.me, now)
            if taken:
                self.world.invariants.on_claim(self, token)
            return taken

        self.world.ask(
            self.slot,
            question,
            lambda taken: self._boot(crashes) if taken else self.die("found its grant taken"),
            lambda: self.die("could not claim"),
        )

    def _boot(self, crashes: bool) -> None:
        world = self.world
        if not self.alive:
            return
        world.tell(self.me, "claimed its grant, boots")
        seconds = world.random.uniform(*BOOT_S)
        if crashes:
            world.after(seconds / 2, lambda: self.die("crashed while booting"))
        world.after(seconds, self._booted)
        self._keep_lease()

    def _keep_lease(self) -> None:
        if self.alive and not self.core_runs:
            self.world.ask(
                self.slot,
                lambda ledger, now: ledger.contact(Contact(self.me), now),
                lambda snapshot: self._boot_watch.on_snapshot(snapshot, self.world.now),
                lambda: self._boot_watch.on_contact_failed(self.world.now),
            )
            self.world.after(0.3, self._keep_lease)

    def _booted(self) -> None:
        if self.alive:
            self.core_runs = True
            now, watch = self.world.now, self._boot_watch
            self.core.begin(now)
            self.core.membership.began_memberless(watch.memberless_since, watch.life, now)
            self._tick()

    def die(self, how: str) -> None:
        if self.alive:
            self.alive = False
            self.world.tell(self.me, how)

    def pause(self, seconds: float) -> None:
        if not self.paused:
            self.paused = True
            self.world.after(seconds, self._resume)

    def _resume(self) -> None:
        self.paused = False
        self._moved_at = self.world.now  # as the real watchdog forgives what it did not see
        waiting, self._stood_still = self._stood_still, []
        for call, *arguments in waiting:
            self._happen(call, *arguments)

    def _happen(self, call: Any, *arguments: Any) -> None:
        """Something that this process would notice: later, if it stands still."""
        if not self.alive:
            return
        if self.paused:
            self._stood_still.append((call, *arguments))
            return
        call(*arguments)
        if self.core.out:
            self._carry_out()

    def receive(self, source: Peer, message: Any) -> None:
        if self.core_runs and self.alive:
            self._happen(self._on_message, source, message)

    def _on_message(self, source: Peer, message: Any) -> None:
        self.core.on_message(source, message, self.world.now)

    def arrives_from(self, peer: Peer) -> bool:
        source = "" if self.world.sees_underway == "any" else peer
        return self.world.underway[(source, self.me)] > 0

    def leaves_to(self, peer: Peer) -> bool:
        return self.world.underway[(self.me, peer)] > 0

    # --- beats ------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._happen(self._beat)
        if self.alive:
            jitter = 0.9 + 0.2 * self.world.random.random()
            self.world.after(self.world.timing.beat_s * jitter, self._tick)

    def _beat(self) -> None:
        core, now = self.core, self.world.now
        core.steps.progress = self._progress
        core.tick(now)
        if core.contact_is_due(now):
            self._contact = core.contact(now)
        if not self._working:
            self._moved_at = now
        self._watch_own_thread()
        self._ask_next()

    def _watch_own_thread(self) -> None:
        if self.world.now - self._moved_at > 2 * self.world.timing.patience_s:
            self.die("was ended by its watchdog")

    # --- the registry -----------------------------------------------------------------------

    def _ask_next(self) -> None:
        if self._asking or not self.alive:
            return
        if self._decisions:
            self._decide(self._decisions.popleft())
        elif self._contact is not None:
            contact, self._contact = self._contact, None
            self._ask(lambda ledger, now: ledger.contact(contact, now), self._on_snapshot)

    def _ask(self, question: Any, answer: Any) -> None:
        self._asking = True
        self.world.ask(
            self.slot,
            question,
            lambda result: self._happen(self._answered, answer, result),
            lambda: self._happen(self._unanswered),
        )

    def _answered(self, answer: Any, result: Any) -> None:
        self._asking = False
        answer(result)
        self._ask_next()

    def _unanswered(self) -> None:
        self._asking = False
        self.registry_unbroken_since = self.world.now
        self.core.on_contact_failed(self.world.now)

    def _on_snapshot(self, snapshot: Any) -> None:
        for grant in snapshot.grants.values():
            action = self._lost_grants.pop(grant.token, None)
            if action is not None and not grant.claimant:
                self.world.invoke(action.slot, action.generation, action.token, action.predecessor)
        self._lost_grants.clear()
        self.core.on_snapshot(snapshot, self.world.now)
        self.world.invariants.on_snapshot_read(self, snapshot.view)

    def _decide(self, action: actions.Propose | actions.GrantSlot | actions.Finish) -> None:
        world = self.world
        if isinstance(action, actions.GrantSlot):
            self._lost_grants[action.token] = action

            def granted(given: bool) -> None:
                self._lost_grants.pop(action.token, None)
                if given:
                    world.tell(self.me, f"grants {action.slot}.{action.generation}")
                    world.invoke(action.slot, action.generation, action.token, action.predecessor)

            self._ask(
                lambda ledger, now: ledger.grant(
                    action.slot, action.generation, action.token, self.me, now
                ),
                granted,
            )
        elif isinstance(action, actions.Finish):
            outcome = action.outcome
            self._ask(lambda ledger, now: ledger.finish(outcome), lambda _: None)
        else:
            proposal = action.proposal

            def question(ledger: Any, now: float) -> bool:
                if proposal.kind == "restore":
                    return bool(ledger.restore("spec", proposal.view.slots, proposal, now))
                return bool(ledger.propose(proposal, now))

            self._ask(
                question,
                lambda accepted: self.core.on_proposed(proposal, accepted, world.now),
            )

    # --- what the core asks for -------------------------------------------------------------

    def _carry_out(self) -> None:
        out, index = self.core.out, 0
        while index < len(out) and self.alive:
            self._act(out[index])
            index += 1
        out.clear()
        self._ask_next()

    def _act(self, action: object) -> None:
        kind = type(action)
        if kind is Send:
            self.world.send(self.me, action.to, action.message)  # type: ignore[attr-defined]
        elif isinstance(action, actions.PushView):
            for peer in action.to:
                self.world.send(self.me, peer, ViewIs(action.view))
        elif isinstance(action, actions.Propose | actions.GrantSlot | actions.Finish):
            self._decisions.append(action)
        elif isinstance(action, actions.ContactNow):
            self._contact = self.core.contact(self.world.now)
        elif isinstance(action, actions.Exit):
            self._leave(action)
        else:
            self._jobs.append(action)
            self._work()

    def _leave(self, action: actions.Exit) -> None:
        if not action.blunt:
            self.world.ask(
                self.slot,
                lambda ledger, now: ledger.leave(self.me, action.cause, now),
                _ignore,
                _ignore,
            )
        self.die(f"leaves: {action.reason}")

    # --- the computing thread ---------------------------------------------------------------

    def _work(self) -> None:
        if self._working or not self._jobs or not self.alive:
            return
        job = self._jobs.popleft()
        self._working = True
        seconds = 0.002
        if isinstance(job, Compute):
            seconds = self.world.random.uniform(*COMPUTE_S)
            for fault in self.world.active:
                if fault.kind == "slow" and self.slot in fault.slots:
                    seconds *= fault.amount
            self.world.after(seconds * 0.6, lambda: self._happen(self._hand_out, job))
        self.world.after(seconds, lambda: self._happen(self._worked, job))

    def _hand_out(self, job: Compute) -> None:
        """The end of a contribution is there before the rest of it."""
        if self.hung or job.step != self.step:
            return
        whole = self.world.reference.contributions[job.step][job.shard]
        start = self.world.random.randrange(len(whole))
        vector = np.full_like(whole, np.nan)
        vector[start:] = whole[start:]
        self._handed_out = (job, vector)
        self.core.on_part(job.step, job.shard, vector, start, len(whole), self.world.now)

    def _worked(self, job: object) -> None:
        if self.hung:
            return  # this thread stands still for good
        self._working = False
        self._progress += 1
        self._moved_at = self.world.now
        self._do(job)
        self._work()

    def _do(self, job: object) -> None:
        world, core = self.world, self.core
        match job:
            case Compute() if job.step == self.step:
                whole = world.reference.contributions[job.step][job.shard]
                vector = whole.copy()
                if self._handed_out is not None and self._handed_out[0] is job:
                    vector = self._handed_out[1]
                    missing = np.isnan(vector)  # the others may have been added to
                    vector[missing] = whole[missing]
                core.on_contribution(job.step, job.shard, vector, world.now)
            case Apply() if job.step == self.step:
                world.invariants.on_mean(self, job.step, job.mean)
                self._hold(job.step + 1, apply(self.state, job.mean))
                core.on_applied(self.step, self.digest, world.now)
            case TakeImage():
                core.on_image(self.step, self.digest, memoryview(self.state), world.now)
            case LoadState():
                if job.step > self.step:
                    self._hold(job.step, bytes(job.image))
                core.on_loaded(self.step, self.digest, world.now)
            case actions.LoadCheckpoint():
                newest = max(world.checkpoints, default=0)
                if newest > self.step:
                    self._hold(newest, world.reference.states[newest])
                core.on_loaded(self.step, self.digest, world.now)
            case WritePieces() if job.step == self.step:
                world.after(0.03, lambda: self._happen(self._written, job.step, job.shards))

    def _hold(self, step: int, state: bytes) -> None:
        self.step, self.state = step, state
        self.digest = digest_of(step, state)
        self.world.invariants.on_state(self)

    def _written(self, step: int, shards: tuple[int, ...]) -> None:
        world = self.world
        if world.is_active("checkpoint-broken", self.slot):
            return
        pieces = world.durable.setdefault(step, set())
        pieces.update(shards)
        if len(pieces) == world.schedule.shards:
            world.checkpoints.add(step)
            self.core.on_durable(step)
            world.ask(
                self.slot,
                lambda ledger, now: ledger.checkpointed(step),
                lambda _: None,
                lambda: None,
            )


def _ignore(*_: object) -> None:
    """For answers that change nothing."""
