"""The step cycle as a pure state machine: contributions, segments, asks, and the last mean.

The state moves only forward. Nothing is ever restarted: a view change keeps contributions and sums,
computes what was adopted and sends again what now goes to someone else. What is missing is asked
for, and who does not answer is accused.

Not here: who is in the view (`fault/membership.py`), whole states (`p2p/transfer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fault.records import AccusationKind, Peer, Timing, View
from p2p.actions import Apply, Compute, Send
from p2p.again import Again
from p2p.collectives.allgather import AllGather
from p2p.collectives.compression import Packing, compression
from p2p.collectives.executor import Executor
from p2p.collectives.memory import Memory, PlainMemory, Vector
from p2p.collectives.schedule import ALLGATHER, RING_TIMES, Schedule, Unit, make_units, schedule_for
from p2p.messages import Ask, NotYet, Segment, Total, Want
from p2p.underway import NothingUnderway, Underway

ASK_LIMIT = 256
"""Segments asked for in one message."""
AGAIN_LIMIT_S = 2.0
"""The same is sent again after so long at the latest, if it is asked for."""
TOTAL, LAST_TOTAL = -1, -2
"""In place of a round: of this step, of the step before."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the step cycle knows of a run. `length` is that of a contribution, in float32."""

    shards: int
    steps: int
    schedule: Schedule
    units: tuple[Unit, ...]
    length: int
    packing: Packing | None = None

    @classmethod
    def of(
        cls,
        collective: str,
        compress: str,
        shards: int,
        steps: int,
        length: int,
        gradient_length: int,
        segment_bytes: int,
        seed: int,
        within_host: bool = False,
    ) -> Shape:
        """The first `gradient_length` elements of a contribution may be rounded on their way."""
        schedule = schedule_for(collective, shards, length, compress != "none", within_host)
        if compress == "none":
            longest = (RING_TIMES if schedule.name == "ring" else 1) * segment_bytes
            units = make_units(length, schedule.chunks, longest)
            return cls(shards, steps, schedule, units, length)
        rounding = compression(compress)
        units = make_units(length, schedule.chunks, segment_bytes, gradient_length, rounding.times)
        packing = Packing(rounding, units, gradient_length, seed)
        return cls(shards, steps, schedule, units, length, packing)

    def executor(self, step: int = 0, memory: Memory | None = None) -> Executor:
        """One for this step; its number matters to what is compressed."""
        if self.schedule.name == ALLGATHER:
            return AllGather(self.schedule, self.units, self.length, memory)
        return Executor(self.schedule, self.units, self.length, memory, self.packing, step)

    def early_bytes(self, nodes: int) -> int:
        """At most so much may come of the next step for a peer that plays so many nodes."""
        if self.schedule.name == ALLGATHER:
            return 4 * self.length * self.shards
        # two vectors for each node, and as much for what may be adopted
        return 4 * self.length * 2 * (nodes + 1)


class Steps:
    """One peer's part in the steps. The core keeps `view` and the state's step up to date."""

    def __init__(
        self,
        me: Peer,
        shape: Shape,
        timing: Timing,
        out: list[object],
        accuse: Callable[[Peer, AccusationKind, float], None],
        mean_is_whole: Callable[[int, str, Vector], None],
        memory: Memory | None = None,
    ) -> None:
        self.me = me
        self.shape = shape
        self.timing = timing
        self.out = out
        self._accuse = accuse
        self._mean_is_whole = mean_is_whole
        self._memory = memory or PlainMemory()
        self.step = -1
        self.digest = ""
        self.view: View | None = None
        self.shards: list[int] = []
        self.stopped = False
        """No further step is begun: the state is being handed over, or the run is over."""
        self.computing = -1
        self.progress = 0
        """Grows while a contribution is being computed; the driver's."""
        self.underway: Underway = NothingUnderway()
        """The driver's as well."""
        self.applying = False
        self.disagreement = False
        """A segment of this step was computed from another state."""
        self.executor: Executor | None = None
        self.last_mean: Vector | None = None
        """The mean of the step before this one, for peers that are still at that."""
        self.digest_before = ""
        self.ahead: tuple[int, Peer] = (-1, "")
        """The newest step that anyone was seen at, and who that was."""
        self.heard_at = -float("inf")
        """When any member was heard; the core's."""
        self.moved_at = 0.0
        """When something last came in that brought this step nearer to its end."""
        self.waited_s = 0.0
        """From the own last contribution to the mean, over all steps."""
        self.began_at = self._contributed_at = 0.0
        self.sent_at: dict[Peer, float] = {}
        """When a segment last went to a member of the view without having been asked for."""
        self._sent: set[tuple[int, int, int, Peer]] = set()
        self._early: dict[tuple[int, int, int, int], Segment] = {}
        """Segments that came before their step began here, or the view in which this peer plays
        their node; one for each hop."""
        self._early_room = shape.early_bytes(0)
        """So many bytes may still be kept."""
        self._again = Again(2 * timing.ask_s, AGAIN_LIMIT_S)
        self._asked_at = 0.0
        self._unanswered: dict[Peer, float] = {}
        self._busy: dict[Peer, tuple[int, float]] = {}

    # --- the course of a step ---------------------------------------------------------------

    def enter(self, view: View, now: float) -> None:
        """A new view. Timers about peers that stay are kept."""
        before, self.view = self.view, view
        if self.ahead[1] not in view.members:
            self.ahead = (-1, "")
        self.shards = view.shards_of(self.me)
        for timers in (self._unanswered, self._busy, self.sent_at):
            for peer in [p for p in timers if p not in view.members]:
                del timers[peer]
        self._again.clear()
        if before is None or self.executor is None:
            self.begin(now)
            return
        self.executor.play(self.shards)
        self.executor.out.extend(self.executor.ready())
        self._go_on(now)

    def stand_at(self, step: int, digest: str, mean: Vector | None) -> None:
        """The state is now of this step. `mean` is that of the step before, if it was applied."""
        self.digest_before = self.digest
        self.step, self.digest = step, digest
        self.last_mean = mean
        self.computing = -1
        self.applying = self.disagreement = False
        self.executor = None
        self._again.clear()
        self._memory.next_step(step)

    def begin(self, now: float) -> None:
        """Starts the step that the state is at, unless there is none to start."""
        if (
            self.view is None
            or self.stopped
            or self.executor is not None
            or not 0 <= self.step < self.shape.steps
        ):
            return
        self.executor = self.shape.executor(self.step, self._memory)
        self.executor.play(self.shards)
        self._sent.clear()
        self._busy.clear()
        self.moved_at = self.began_at = now
        early, self._early = self._early, {}
        self._early_room = self.shape.early_bytes(len(self.shards))
        for segment in early.values():
            if segment.step == self.step:
                self._take(segment)
        self._go_on(now)

    def on_contribution(self, step: int, shard: int, vector: Vector, now: float) -> None:
        if step != self.step:
            return  # asked for before a newer state came
        if shard == self.computing:
            self.computing = -1
        if self.executor is not None:
            self.executor.contribute(shard, vector)
            self.moved_at = self._contributed_at = now
            self._go_on(now)

    def on_part(
        self, step: int, shard: int, vector: Vector, start: int, stop: int, now: float
    ) -> None:
        """Of a contribution that is still being computed, these elements are there."""
        if step == self.step and self.executor is not None:
            self.executor.contribute_part(shard, vector, start, stop)
            self._go_on(now)

    def _go_on(self, now: float) -> None:
        executor, view = self.executor, self.view
        assert executor is not None and view is not None
        for outgoing in executor.out:
            player = view.players[outgoing.destination]
            key = (*executor.identity(outgoing), player)
            if player != self.me and key not in self._sent:
                self._sent.add(key)
                if self._send_segment(outgoing.round, outgoing.unit, outgoing.destination, player):
                    self.sent_at[player] = now
        executor.out.clear()
        if executor.complete:
            if self.applying:
                return
            if self._memory.holds(self.step):
                self.applying = True
                self.waited_s += max(0.0, now - max(self._contributed_at, self.began_at))
                self.out.append(Apply(self.step, executor.mean))
                self._mean_is_whole(self.step, self.digest, executor.mean)
            elif self.computing < 0:  # else its vector, which was added to, would be taken again
                # others are steps ahead, and took this peer for dead: it has read what is later
                self.executor = None
                self.begin(now)
        elif self.computing < 0:
            shard = next((shard for shard in self.shards if executor.needs(shard)), -1)
            if shard >= 0:
                self.computing = shard
                self.out.append(Compute(self.step, shard))

    def _send_segment(
        self, round: int, unit: int, destination: int, to: Peer, again: bool = False
    ) -> bool:
        assert self.executor is not None and self.view is not None
        values = self.executor.payload(round, unit, destination)
        if values is None:
            return False
        payload = values.data.cast("B")
        segment = Segment(
            self.view.number, self.step, round, unit, destination, self.digest, payload
        )
        self.out.append(Send(to, segment, again))
        return True

    # --- what others send -------------------------------------------------------------------

    def on_segment(self, source: Peer, segment: Segment, now: float) -> None:
        self._answered(source)
        if segment.step == self.step and self.executor is not None:
            if self._take(segment):
                self.moved_at = now
                self._go_on(now)
        elif segment.step >= self.step:
            if segment.step > self.step:
                self._see(source, segment.step)
            if segment.step <= self.step + 1 and self._is_hop(segment):
                key = (segment.step, segment.round, segment.unit, segment.dst)
                if key not in self._early and len(segment.payload) <= self._early_room:
                    self._early[key] = segment
                    self._early_room -= len(segment.payload)

    def place(self, segment: Segment) -> memoryview | Callable[[int, memoryview], None] | None:
        """Where the segment's payload may be written already while it comes, or who adds it, given
        the first byte's place and the bytes; None: nowhere."""
        executor, hop = self.executor, (segment.round, segment.unit, segment.dst)
        is_of_use = segment.step == self.step and segment.digest == self.digest
        if executor is None or not is_of_use or not self._is_hop(segment):
            return None
        if not executor.is_next(*hop):
            return executor.place(*hop)

        def add(start: int, piece: memoryview) -> None:
            if self.executor is executor:  # else its vectors may be others' by now
                executor.add_piece(*hop, start, piece)

        return add

    def _is_hop(self, segment: Segment) -> bool:
        """Whether the schedule has it, and it is as long as it should be."""
        shape = self.shape
        if not (0 <= segment.dst < shape.shards and 0 <= segment.unit < len(shape.units)):
            return False
        unit = shape.units[segment.unit]
        part = shape.schedule.parts[unit.chunk][segment.dst]
        size = 4 * (unit.stop - unit.start)
        if shape.packing is not None:
            size = shape.packing.size(segment.unit)
        return part.hears(segment.round) and len(segment.payload) == size

    def _take(self, segment: Segment) -> bool:
        assert self.executor is not None
        if segment.digest != self.digest:
            self.disagreement = True
            return False
        return self.executor.receive(segment.round, segment.unit, segment.dst, segment.payload)

    def on_total(self, source: Peer, total: Total, now: float) -> None:
        self._answered(source)
        if total.step != self.step or self.executor is None:
            return
        if total.digest != self.digest:
            self.disagreement = True
        elif self.executor.receive_total(total.unit, total.payload):
            self.moved_at = now
            self._go_on(now)

    def on_ask(self, source: Peer, ask: Ask, now: float) -> None:
        """Answers with the segments, or with "not yet", also if they may still be on their way."""
        asked = ask.items[: 3 * ASK_LIMIT]
        items = [asked[i : i + 3] for i in range(0, len(asked) - 2, 3)]
        executor = self.executor
        if ask.step > self.step:
            self._see(source, ask.step)
        elif self.underway.leaves_to(source):
            pass  # once more would only make it longer
        elif ask.step == self.step and executor is not None:
            complete = True
            for round, unit, destination in items:
                is_total = executor.total(unit) is not None
                key = (source, TOTAL, unit, 0) if is_total else (source, round, unit, destination)
                if not self._again.allows(key, now):
                    complete = False
                elif is_total:
                    self._send_total(source, self.step, unit, executor.mean)
                    self._again.sent(key, now)
                elif self._send_segment(round, unit, destination, source, again=True):
                    self._again.sent(key, now)
                else:
                    complete = False
            if complete:
                return
        elif ask.step == self.step - 1 and self.last_mean is not None:
            known = range(len(self.shape.units))
            units = dict.fromkeys([unit for _, unit, _ in items if unit in known])
            if self._send_last_mean(source, units, now):
                return
        view = self.view.number if self.view is not None else -1
        busy = self.computing >= 0 or self.applying
        self.out.append(Send(source, NotYet(view, self.step, busy, self.progress)))

    def on_want(self, source: Peer, want: Want, now: float) -> bool:
        """Sends the last mean to a peer one step behind; False when it takes more than that."""
        if want.step != self.step - 1 or self.last_mean is None:
            return False
        if not self.underway.leaves_to(source):
            self._send_last_mean(source, range(len(self.shape.units)), now)
        return True

    def _send_last_mean(self, to: Peer, units: Iterable[int], now: float) -> bool:
        """False when all of these units went there a moment ago."""
        assert self.last_mean is not None
        due = [unit for unit in units if self._again.allows((to, LAST_TOTAL, unit, 0), now)]
        for unit in due:
            self._send_total(to, self.step - 1, unit, self.last_mean)
            self._again.sent((to, LAST_TOTAL, unit, 0), now)
        return bool(due)

    def on_not_yet(self, source: Peer, answer: NotYet, now: float) -> None:
        self._answered(source)
        if answer.step > self.step:
            self._see(source, answer.step)
        known = self._busy.get(source)
        if not answer.busy:
            self._busy.pop(source, None)
        elif known is None or known[0] != answer.progress:
            self._busy[source] = (answer.progress, now)

    def _send_total(self, to: Peer, step: int, unit: int, mean: Vector) -> None:
        if 0 <= unit < len(self.shape.units):
            cut = self.shape.units[unit]
            payload = mean[cut.start : cut.stop].data.cast("B")
            digest = self.digest if step == self.step else self.digest_before
            self.out.append(Send(to, Total(step, unit, digest, payload), again=True))

    def _see(self, peer: Peer, step: int) -> None:
        if step > self.ahead[0]:
            self.ahead = (step, peer)

    def _answered(self, peer: Peer) -> None:
        self._unanswered.pop(peer, None)

    # --- what is missing --------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Nothing to do here but to wait for others."""
        executor = self.executor
        return executor is not None and not executor.complete and self.computing < 0

    def stalled(self, now: float) -> bool:
        """No step finishes although all that this peer can do is done."""
        return self.waiting and now - self.moved_at > self.timing.unanswered_s

    def tick(self, now: float) -> None:
        if not self.waiting:
            self._unanswered.clear()
            return
        if now - max(self.moved_at, self._asked_at) >= self.timing.ask_s * 0.999:
            self._asked_at = now
            self._ask(now)
        view, timing = self.view, self.timing
        assert view is not None
        if now - self.heard_at > timing.unanswered_s / 2:
            # who hears nobody at all is cut off itself
            self._unanswered = dict.fromkeys(self._unanswered, now)
            # nor does it hear how busy the others are
            self._busy = {peer: (progress, now) for peer, (progress, _) in self._busy.items()}
        for peer, since in self._unanswered.items():
            if now - since > timing.unanswered_s:
                self._accuse(peer, "unreachable", now)
        for peer, (_, since) in self._busy.items():
            if now - since > timing.patience_s * max(1, len(view.shards_of(peer))):
                self._accuse(peer, "hung", now)

    def _ask(self, now: float) -> None:
        assert self.executor is not None and self.view is not None
        items: dict[Peer, list[int]] = {}
        # what is missing may be what is coming, or come after it
        coming = [peer for peer in self.view.members if self.underway.arrives_from(peer)]
        for missing in self.executor.missing():
            player = self.view.players[missing.source]
            if player in coming:
                continue
            wanted = items.setdefault(player, [])
            if len(wanted) < 3 * ASK_LIMIT:
                wanted += [missing.round, missing.unit, missing.destination]
        for peer in [p for p in self._unanswered if p not in items]:
            del self._unanswered[peer]
        for peer in [p for p in self._busy if p not in items]:
            del self._busy[peer]
        for peer, wanted in items.items():
            self._unanswered.setdefault(peer, now)
            self.out.append(Send(peer, Ask(self.view.number, self.step, tuple(wanted))))
