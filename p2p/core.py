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
from p2p.actions import Evaluate, Send, WritePieces
from p2p.collectives.memory import Memory, Vector
from p2p.following import Follower, Leader
from p2p.handover import HandOver
from p2p.steps import Shape, Steps
from p2p.transfer import Transfer

RETRY_SHARE = 8
"""A checkpoint that broke is due again after this part of the interval."""
BEAT_SHARE = 0.5
"""A segment that was sent less than this part of a beat ago may stand in for the next one."""
SIGN_BEATS = 2.0
"""Segments are signs of life for so long from the beginning of a step on."""
CALM_BEATS = 3
"""A member whose run goes well makes contact with the registry once in so many beats."""
HOST_PATIENCE_S = 1.0
"""A candidate that gets nothing from one member for so long turns to the next."""


class Core:
    """One invocation of one peer, from its claim to its exit."""

    def __init__(
        self,
        me: Peer,
        shape: Shape,
        timing: Timing,
        new_id: Callable[[], str],
        checkpoint_every: int = 50,
        evaluate_every: int = 0,
        predecessor: Peer = "",
        deadline: float = float("inf"),
        memory: Memory | None = None,
    ) -> None:
        self.me = me
        self.shape = shape
        self.timing = timing
        self.checkpoint_every = checkpoint_every
        self.evaluate_every = evaluate_every
        self.out: list[object] = []
        self.membership = Membership(
            me, shape.shards, timing, new_id, self.out, self._enter, predecessor, deadline
        )
        self.leader = Leader(shape, self.out)
        self.follower = Follower(shape, self.out)
        accuse, on_mean = self.membership.suspicion.accuse, self.leader.on_mean
        self.steps = Steps(me, shape, timing, self.out, accuse, on_mean, memory)
        self.transfer = Transfer(self.out)
        self.hand_over = HandOver(self.membership, self.steps, self.leader, timing)
        self._left_out_at: dict[Peer, int] = {}
        """The step at which a beat to this member was left out."""
        self._contacted_at = -float("inf")
        self._told: tuple[int, int] = (-1, -1)
        """The step and the shard that the last contact said were being computed."""
        self._contact_failed = False
        self._candidate_beat_at = -float("inf")
        self._host: Peer = ""
        self._host_heard_at = -float("inf")
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
        steps = self.steps
        self._contacted_at, self._told = now, (steps.step, steps.computing)
        doing = Doing(steps.step, steps.digest, steps.computing, self.hand_over.out_of_time(now))
        return Contact(self.me, doing, steps.step, self.membership.suspicion.accusations(now))

    def contact_is_due(self, now: float) -> bool:
        """At each beat, but for a member that has nothing to tell and nothing to find out."""
        is_seldom = self._is_calm(now) and not self._is_at_something_long(now)
        beats = CALM_BEATS if is_seldom else 1
        return now - self._contacted_at >= (beats - 0.5) * self.timing.beat_s

    def _is_at_something_long(self, now: float) -> bool:
        """It computes for longer than a beat, and the registry does not know at what yet."""
        steps = self.steps
        is_long = steps.computing >= 0 and now - steps.began_at > self.timing.beat_s
        return is_long and (steps.step, steps.computing) != self._told

    def _is_calm(self, now: float) -> bool:
        """Steps go on, the run is complete and durable, and nobody comes, goes or suspects."""
        membership, steps = self.membership, self.steps
        view, snapshot = membership.view, membership.snapshot
        if self._contact_failed or steps.stopped or steps.disagreement or self._failure is not None:
            return False
        if membership.role != "member" or view is None or snapshot is None:
            return False
        waits = steps.computing < 0 and now - steps.moved_at > self.timing.beat_s
        if waits or self.hand_over.out_of_time(now):
            return False
        return (
            snapshot.is_quiet(view)
            and not membership.suspicion.accusations(now)
            and not self._lacks_checkpoint(steps.step)
        )

    def on_snapshot(self, snapshot: Snapshot, now: float) -> None:
        self._contact_failed = False
        membership = self.membership
        membership.stalled = self.steps.stalled(now)
        membership.disagreement = self.steps.disagreement
        membership.on_snapshot(snapshot, now)
        convicted = next((each for each in snapshot.suspects if each.convicted), None)
        if convicted is not None and snapshot.outcome is None:
            self.fail(verdict_on(convicted), now)
        self.hand_over.look(now)

    def on_contact_failed(self, now: float) -> None:
        self._contact_failed = True
        self.membership.on_contact_failed(now)
        self.hand_over.on_answer()

    def on_proposed(self, proposal: Proposal, accepted: bool, now: float) -> None:
        self.membership.on_proposed(proposal, accepted, now)
        if not accepted and self.steps.stopped:
            self.out.append(actions.ContactNow())  # who was faster? look, and propose again
        self.hand_over.on_answer()

    # --- this peer's own work ---------------------------------------------------------------

    def on_loaded(self, step: int, digest: str, now: float) -> None:
        """The state is now that of `step`: from a checkpoint, fresh, or from another peer."""
        self.transfer.loading = False
        if step <= self.steps.step:
            return
        self._stand_at(step, digest, None, now)

    def on_load_failed(self) -> None:
        """The image that came was damaged; it is wanted again."""
        self.transfer.loading = False

    def on_image(self, step: int, digest: str, image: memoryview, now: float) -> None:
        self.transfer.on_image(step, digest, image, now)

    def on_contribution(self, step: int, shard: int, vector: Vector, now: float) -> None:
        self.steps.on_contribution(step, shard, vector, now)

    def on_part(
        self, step: int, shard: int, vector: Vector, start: int, stop: int, now: float
    ) -> None:
        self.steps.on_part(step, shard, vector, start, stop, now)

    def on_applied(self, step: int, digest: str, now: float) -> None:
        """The state is now that of `step`, one further."""
        executor = self.steps.executor
        mean = executor.mean if executor is not None and executor.complete else None
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
                # later, it may come from a queue, of a peer that is dead by now
                is_sign = now - steps.began_at <= SIGN_BEATS * self.timing.beat_s
                membership.on_segment(source, message.view, is_sign, now)
                steps.on_segment(source, message, now)
            case messages.Total():
                if membership.role == "candidate":
                    self._hear_host(source, now)
                    self.follower.on_total(source, message)
                else:
                    steps.on_total(source, message, now)
            case messages.Ask():
                membership.on_view_number(source, message.view, now)
                if steps.step - message.step > 1:
                    self._give_state(source, messages.Want(message.step, -1, "", ()), now)
                steps.on_ask(source, message, now)
            case messages.NotYet():
                membership.on_view_number(source, message.view, now)
                steps.on_not_yet(source, message, now)
            case messages.Want():
                self._on_want(source, message, now)
            case messages.StatePart():
                self._hear_host(source, now)
                self.transfer.on_part(source, message, steps.step)
            case messages.Follow():
                self._on_follow(source, message, now)
            case messages.Ready():
                membership.on_ready(source, message.step, now)
            case messages.ViewIs():
                membership.on_view(message.view, now)
        if steps.disagreement and not membership.disagreement:
            self.out.append(actions.ContactNow())

    def _on_want(self, source: Peer, want: messages.Want, now: float) -> None:
        steps, view = self.steps, self.membership.view
        if view is not None and source not in view.members:
            self.leader.expect(source, now)
            self.hand_over.on_part_wanted(source, now)
        if steps.step > want.step and not steps.on_want(source, want, now):
            self._give_state(source, want, now)

    def _on_follow(self, source: Peer, follow: messages.Follow, now: float) -> None:
        is_busy = self.steps.underway.leaves_to(source)
        if not self.leader.on_follow(source, follow, self.steps.step, is_busy, now):
            self._give_state(source, messages.Want(follow.step, -1, "", ()), now)
        self.hand_over.look(now)

    def _hear_host(self, source: Peer, now: float) -> None:
        if source == self._host:
            self._host_heard_at = now

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
        self.leader.tick(now)
        if self.gone:
            return
        if self._failure is not None:
            self.fail(self._failure, now)
        if self.membership.role == "member":
            self._beat(now)
            self.steps.tick(now)
            self._catch_up(now)
            self.hand_over.look(now)
            self._finish(now)
        elif now - self._candidate_beat_at >= self.timing.candidate_beat_s * 0.999:
            self._candidate_beat_at = now
            self._call_on_members(now)

    def _beat(self, now: float) -> None:
        """To each watcher, but to whom a segment went a moment ago, which says as much.

        It may be lost, or stuck in a queue, which no beat ever is. So the next beat is sent in any
        case, unless a step was finished since, which takes everyone's segments.
        """
        view, steps = self.membership.view, self.steps
        assert view is not None
        moment_s = BEAT_SHARE * self.timing.beat_s
        beat = messages.Beat(view.number, steps.step, steps.digest, steps.progress, steps.computing)
        for peer in watchers_of(self.me, view.members):
            has_gone = now - steps.sent_at.get(peer, -float("inf")) < moment_s
            if has_gone and steps.step > self._left_out_at.get(peer, -1):
                self._left_out_at[peer] = steps.step
            else:
                self._send(peer, beat)

    def _call_on_members(self, now: float) -> None:
        """A candidate says that it is there, takes a state from one member, and follows it."""
        membership, steps = self.membership, self.steps
        view = membership.snapshot.view if membership.snapshot is not None else None
        members = view.members if view is not None else ()
        for peer in members:
            self._send(peer, messages.Ready(steps.step, steps.digest))
        self._choose_host(members, now)
        if not self._host:
            return
        if steps.step < 0 or self.transfer.receiving:
            if steps.underway.arrives_from(self._host):
                self._hear_host(self._host, now)
            self._want(self._host)
        else:
            self._send(self._host, self.follower.word())

    def _want(self, peer: Peer) -> None:
        """A newer state, of this peer or of whoever is sending one already."""
        source = self.transfer.source or peer
        is_coming = self.steps.underway.arrives_from(source)
        self.transfer.want(peer, self.steps.step, is_coming)

    def _choose_host(self, members: tuple[Peer, ...], now: float) -> None:
        """The peer to replace, while it is there; else one member after another."""
        if self.membership.predecessor in members:
            self._host = self.membership.predecessor
        elif not members:
            self._host = ""
        elif self._host not in members or now - self._host_heard_at > HOST_PATIENCE_S:
            turn = members.index(self._host) + 1 if self._host in members else self.membership.slot
            self._host = members[turn % len(members)]
            self._host_heard_at = now

    def _catch_up(self, now: float) -> None:
        """Who is behind asks for the last mean or the state, unless the step ends by itself."""
        steps = self.steps
        ahead, peer = steps.ahead
        idle = now - max(steps.moved_at, self._wanted_at) >= self.timing.ask_s * 0.999
        if ahead > steps.step and steps.computing < 0 and not steps.applying and idle:
            self._wanted_at = now
            self._want(peer)
            # should that peer not answer, whoever is heard next is asked
            steps.ahead = (-1, "")

    # --- what happens at a step boundary ----------------------------------------------------

    def _enter(self, view: View, now: float) -> None:
        self.steps.enter(view, now)
        self._left_out_at.clear()
        self._pieces_at = -float("inf")

    def _stand_at(self, step: int, digest: str, mean: Vector | None, now: float) -> None:
        steps, membership = self.steps, self.membership
        followed = self.follower.stand_at(step, digest)
        steps.stand_at(step, digest, followed if followed is not None else mean)
        membership.state_step = step
        if steps.ahead[0] <= step:
            steps.ahead = (-1, "")
        if membership.role != "member":
            if self._host:
                self._send(self._host, self.follower.word())
            return
        if step < self.shape.steps:
            if self._checkpoint_is_due(step, now):
                self.out.append(WritePieces(step, tuple(steps.shards)))
            if self.evaluate_every and step % self.evaluate_every == 0:
                self._evaluate(step)
            self.hand_over.at_boundary(now)
            if self._leave_in_time(now):
                return
        steps.begin(now)
        self._finish(now)

    def _evaluate(self, step: int) -> None:
        """Two members see to it, so that the crash of one does not lose it."""
        shards = self.shape.shards
        if not {0, shards // 2}.isdisjoint(self.steps.shards):
            self.out.append(Evaluate(step))

    def _leave_in_time(self, now: float) -> bool:
        """A step that may not end before the deadline is not begun, if others can go on."""
        hand_over, stopped = self.hand_over, self.steps.stopped
        if stopped or not hand_over.out_of_time(now) or not hand_over.someone_stays():
            return False
        self.membership.leave("out of time")
        return True

    def _checkpoint_is_due(self, step: int, now: float) -> bool:
        """At every interval; more often while the last one is not durable, or all may be lost."""
        every = self.checkpoint_every
        if step % every == 0:
            return True
        if self.hand_over.out_of_time(now) and not self.hand_over.someone_stays():
            return True
        return step % max(1, every // RETRY_SHARE) == 0 and self._lacks_checkpoint(step)

    def _lacks_checkpoint(self, step: int) -> bool:
        """Whether that of the newest interval is not known to be durable."""
        snapshot = self.membership.snapshot
        durable = max(snapshot.checkpoint if snapshot is not None else -1, self._durable)
        return durable < step - step % self.checkpoint_every

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
