"""A peer without sockets, clocks, threads or torch: membership, steps and transfers as one.

The driver (`peer.py`, or the simulator) calls the `on_…` methods and `tick` with what happened and
the time in seconds, and carries out the actions in `out`, in order. Same calls, same actions.
"""

from __future__ import annotations

from collections.abc import Callable

from fault import actions
from fault.assignment import watchers_of
from fault.membership import Membership
from fault.records import Contact, Doing, Outcome, Peer, Proposal, Snapshot, Suspect, Timing, View
from p2p import messages
from p2p.actions import Send, WritePieces
from p2p.collectives.executor import Vector
from p2p.steps import Shape, Steps
from p2p.transfer import Transfer

RETRY_SHARE = 8
"""A checkpoint that broke is due again after this part of the interval."""


class Core:
    """One invocation of one peer, from its claim to its exit."""

    def __init__(
        self,
        me: Peer,
        shape: Shape,
        timing: Timing,
        new_id: Callable[[], str],
        checkpoint_every: int = 50,
        predecessor: Peer = "",
        deadline: float = float("inf"),
    ) -> None:
        self.me = me
        self.shape = shape
        self.timing = timing
        self.checkpoint_every = checkpoint_every
        self.out: list[object] = []
        self.membership = Membership(
            me, shape.shards, timing, new_id, self.out, self._enter, predecessor, deadline
        )
        self.steps = Steps(me, shape, timing, self.out, self.membership.accuse)
        self.transfer = Transfer(self.out)
        self._handover_at = -float("inf")
        self._acknowledged = False
        self._candidate_beat_at = -float("inf")
        self._turn = 0
        self._wanted_at = -float("inf")
        self._pieces_at = -float("inf")
        self._durable = -1
        self._failure: Outcome | None = None
        self._finish_at = -float("inf")

    @property
    def gone(self) -> bool:
        return self.membership.role == "gone"

    # --- the registry -----------------------------------------------------------------------

    def begin(self, now: float) -> None:
        self.membership.begin(now)

    def contact(self, now: float) -> Contact:
        """What the next call to the registry says."""
        steps, deadline = self.steps, self.membership.deadline
        doing = Doing(
            steps.step,
            steps.digest,
            steps.computing,
            near_deadline=now > deadline - self.timing.deadline_slack_s,
        )
        return Contact(self.me, doing, steps.step, self.membership.current_accusations(now))

    def on_snapshot(self, snapshot: Snapshot, now: float) -> None:
        membership = self.membership
        membership.stalled = self.steps.stalled(now)
        membership.disagreement = self.steps.disagreement
        membership.on_snapshot(snapshot, now)
        convicted = next((each for each in snapshot.suspects if each.convicted), None)
        if convicted is not None and snapshot.outcome is None:
            self.fail(verdict_on(convicted), now)

    def on_contact_failed(self, now: float) -> None:
        self.membership.on_contact_failed(now)

    def on_proposed(self, proposal: Proposal, accepted: bool, now: float) -> None:
        self.membership.on_proposed(proposal, accepted, now)

    # --- this peer's own work ---------------------------------------------------------------

    def on_loaded(self, step: int, digest: str, now: float) -> None:
        """The state is now that of `step`: from a checkpoint, fresh, or from another peer."""
        self.transfer.loading = False
        if step <= self.steps.step:
            return
        self._stand_at(step, digest, None, now)
        self._acknowledge()

    def _acknowledge(self) -> None:
        membership, steps = self.membership, self.steps
        if membership.role == "candidate" and membership.predecessor:
            self._send(membership.predecessor, messages.StateAck(steps.step, steps.digest))

    def on_load_failed(self) -> None:
        """The image that came was damaged; it is wanted again."""
        self.transfer.loading = False

    def on_image(self, step: int, digest: str, image: memoryview, now: float) -> None:
        self.transfer.on_image(step, digest, image, now)

    def on_contribution(self, step: int, shard: int, vector: Vector, now: float) -> None:
        self.steps.on_contribution(step, shard, vector, now)

    def on_applied(self, step: int, digest: str, now: float) -> None:
        """The state is now that of `step`, one further."""
        executor = self.steps.executor
        mean = executor.mean if executor is not None else None
        self._stand_at(step, digest, mean, now)

    def on_raised(self, trace: str) -> None:
        """The task raised; someone else will try, unless it raises there as well."""
        self.membership.leave("the task raised", cause=trace)

    def on_not_finite(self, step: int, loss: float, now: float) -> None:
        reason = f"the loss of step {step} is {loss}: the run stops there, and keeps its checkpoint"
        self.fail(Outcome("failed", step, self.steps.digest, "NonFiniteLoss", reason), now)

    def on_durable(self, step: int) -> None:
        """The checkpoint of this step is whole."""
        self._durable = max(self._durable, step)

    def fail(self, outcome: Outcome, now: float) -> None:
        """Ends the run; said again until the registry has it."""
        self._failure = self._failure or outcome
        if now - self._finish_at >= 1.0:
            self._finish_at = now
            self.out.append(actions.Finish(self._failure))

    # --- messages ---------------------------------------------------------------------------

    def on_message(self, source: Peer, message: messages.Message, now: float) -> None:
        if self.gone or source == self.me:
            return
        steps, membership = self.steps, self.membership
        steps.heard_at = now
        match message:
            case messages.Beat():
                membership.on_beat(source, message.view, now)
            case messages.Segment():
                membership.on_view_number(source, message.view, now)
                steps.on_segment(source, message, now)
            case messages.Total():
                steps.on_total(source, message, now)
            case messages.Ask():
                membership.on_view_number(source, message.view, now)
                if steps.step - message.step > 1:
                    self._give_state(source, messages.Want(message.step, -1, "", ()), now)
                steps.on_ask(source, message)
            case messages.NotYet():
                membership.on_view_number(source, message.view, now)
                steps.on_not_yet(source, message, now)
            case messages.Want():
                if steps.step > message.step and not steps.on_want(source, message):
                    self._give_state(source, message, now)
            case messages.StatePart():
                if (message.step, message.digest) == (steps.step, steps.digest):
                    self._acknowledge()
                self.transfer.on_part(source, message, steps.step)
            case messages.StateAck():
                if source == membership.successor and message.digest == steps.digest:
                    self._acknowledged = True
                    membership.propose_swap(source)
            case messages.Ready():
                membership.on_ready(source, message.step, now)
            case messages.ViewIs():
                membership.on_view(message.view, now)
        if steps.disagreement and not membership.disagreement:
            self.out.append(actions.ContactNow())

    def _give_state(self, source: Peer, want: messages.Want, now: float) -> None:
        if self.steps.step >= 0 and not self.steps.applying:
            self.transfer.on_want(source, want, self.steps.step, self.steps.digest, now)

    def _send(self, to: Peer, message: messages.Message) -> None:
        self.out.append(Send(to, message))

    # --- time -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Every beat, after the messages at hand were taken in."""
        if self.gone:
            return
        self.membership.tick(now)
        self.transfer.tick(now)
        if self.gone:
            return
        if self._failure is not None:
            self.fail(self._failure, now)
        if self.membership.role == "member":
            self._beat()
            self.steps.tick(now)
            self._catch_up(now)
            self._hand_over(now)
            self._finish(now)
        elif now - self._candidate_beat_at >= self.timing.candidate_beat_s * 0.999:
            self._candidate_beat_at = now
            self._call_on_members()

    def _beat(self) -> None:
        view, steps = self.membership.view, self.steps
        assert view is not None
        beat = messages.Beat(view.number, steps.step, steps.digest, steps.progress, steps.computing)
        for peer in watchers_of(self.me, view.members):
            self._send(peer, beat)

    def _call_on_members(self) -> None:
        """A candidate says that it could be admitted, or asks the members in turn for a state."""
        membership, steps = self.membership, self.steps
        view = membership.snapshot.view if membership.snapshot is not None else None
        members = view.members if view is not None else ()
        hosts = tuple(dict.fromkeys((*members, membership.predecessor)))
        hosts = tuple([peer for peer in hosts if peer and peer != self.me])
        if steps.step >= 0 or membership.predecessor in members:
            for peer in hosts:
                self._send(peer, messages.Ready(steps.step, steps.digest))
        if steps.step < 0 and hosts and membership.predecessor not in members:
            self._turn += 1
            self.transfer.want(hosts[self._turn % len(hosts)], steps.step)

    def _catch_up(self, now: float) -> None:
        """Who is behind asks for the last mean or the state, unless the step ends by itself."""
        steps = self.steps
        ahead, peer = steps.ahead
        idle = now - max(steps.moved_at, self._wanted_at) >= self.timing.ask_s * 0.999
        if ahead > steps.step and steps.computing < 0 and not steps.applying and idle:
            self._wanted_at = now
            self.transfer.want(peer, steps.step)
            # should that peer not answer, whoever is heard next is asked
            steps.ahead = (-1, "")

    # --- what happens at a step boundary ----------------------------------------------------

    def _enter(self, view: View, now: float) -> None:
        self.steps.enter(view, now)
        self._pieces_at = -float("inf")

    def _stand_at(self, step: int, digest: str, mean: Vector | None, now: float) -> None:
        steps, membership = self.steps, self.membership
        steps.stand_at(step, digest, mean)
        membership.state_step = step
        if steps.ahead[0] <= step:
            steps.ahead = (-1, "")
        if membership.role != "member":
            return
        if step < self.shape.steps and self._checkpoint_is_due(step):
            self.out.append(WritePieces(step, tuple(steps.shards)))
        self._begin_hand_over(now)
        steps.begin(now)
        self._finish(now)

    def _checkpoint_is_due(self, step: int) -> bool:
        """At every interval; and more often while the last one is not durable."""
        every, snapshot = self.checkpoint_every, self.membership.snapshot
        if step % every == 0:
            return True
        durable = max(snapshot.checkpoint if snapshot is not None else -1, self._durable)
        return step % max(1, every // RETRY_SHARE) == 0 and durable < step - step % every

    def _begin_hand_over(self, now: float) -> None:
        successor = self.membership.ready_successor(now)
        if successor and self.steps.step < self.shape.steps:
            self.membership.successor = successor
            self._handover_at = now
            self._acknowledged = False
            self.steps.stopped = True
            self._give_state(successor, messages.Want(-1, -1, "", ()), now)

    def _hand_over(self, now: float) -> None:
        """While stopped: offer the state again, or go on when the successor does not answer."""
        steps, membership = self.steps, self.membership
        if not steps.stopped:
            return
        if now - self._handover_at > self.timing.handover_ack_s * (2 if self._acknowledged else 1):
            steps.stopped = False
            steps.begin(now)
        elif self._acknowledged:
            membership.propose_swap(membership.successor)
        else:
            self._give_state(membership.successor, messages.Want(-1, -1, "", ()), now)

    def _finish(self, now: float) -> None:
        """At the last step: pieces until they are whole, then the outcome until it is read back."""
        steps, membership = self.steps, self.membership
        if steps.step < self.shape.steps or steps.view is None or self._failure is not None:
            return
        if self._durable < steps.step:
            if now - self._pieces_at >= 0.2:
                self._pieces_at = now
                self.out.append(WritePieces(steps.step, tuple(steps.shards)))
            return
        rank = steps.view.members.index(self.me)
        if now - self._finish_at >= 1.0 and membership.my_turn("finish", rank, now):
            self._finish_at = now
            self.out.append(actions.Finish(Outcome("finished", steps.step, steps.digest)))


def verdict_on(suspect: Suspect) -> Outcome:
    """How a run ends whose (shard, step) is convicted."""
    cause = next((death.cause for death in suspect.deaths if death.cause), "")
    where = f"shard {suspect.shard} of step {suspect.step}"
    count = len(suspect.deaths)
    if cause == "out of memory":
        reason = f"{where} needs more memory than a function has: {count} peers ran out of it there"
        return Outcome("failed", suspect.step, "", "OutOfMemory", reason)
    kind = f"{cause.strip().splitlines()[-1]}" if cause else "no cause is known"
    reason = f"{where} ended every peer that computed it, {count} in all: {kind}"
    return Outcome("failed", suspect.step, "", "Poisoned", reason, cause)
