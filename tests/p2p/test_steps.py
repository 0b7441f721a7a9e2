"""The step cycle where its memory is lent by others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fault.records import Timing, View
from p2p.actions import Apply, Compute, Send
from p2p.collectives.memory import PlainMemory
from p2p.collectives.schedule import make_schedule, make_units
from p2p.messages import Ask, NotYet, Segment, Total, Want
from p2p.steps import ASK_LIMIT, Shape, Steps

LENGTH = 6
VIEW = View(1, "view", ("a", "b"), ("a", "b"), 2)


class Lent(PlainMemory):
    """Memory of others, which may have gone on."""

    gone = False

    def holds(self, step: int) -> bool:
        return not self.gone


def segments_of(steps: Steps) -> list[Segment]:
    return [
        each.message
        for each in steps.out
        if isinstance(each, Send) and isinstance(each.message, Segment)
    ]


def new_steps(
    me: str, memory: PlainMemory, length: int = LENGTH, segment_bytes: int = 1 << 20
) -> Steps:
    schedule = make_schedule("ring", 2)
    shape = Shape(2, 9, schedule, make_units(length, schedule.chunks, segment_bytes), length)
    steps = Steps(me, shape, Timing(), [], lambda *_: None, lambda *_: None, memory)
    steps.stand_at(3, "digest", None)
    steps.enter(VIEW, 0.0)
    return steps


def test_what_was_read_and_has_gone_is_not_applied() -> None:
    """The peer was taken for dead while it summed: it begins the step anew, and asks."""
    memory = Lent()
    late, other = new_steps("a", memory), new_steps("b", PlainMemory())
    for shard, steps in ((0, late), (1, other)):
        steps.on_contribution(3, shard, np.full(LENGTH, 1.0 + shard, np.float32), 0.0)
    for segment in segments_of(late):
        other.on_segment("a", segment, 0.0)
    memory.gone = True
    late.out.clear()
    for segment in segments_of(other):
        late.on_segment("b", segment, 0.1)
    assert [each for each in late.out if isinstance(each, Apply)] == []
    assert [each.shard for each in late.out if isinstance(each, Compute)] == [0]
    memory.gone = False
    late.on_contribution(3, 0, np.full(LENGTH, 1.0, np.float32), 0.2)
    late.out.clear()
    late.tick(1.0)
    (ask,) = [each.message for each in late.out if isinstance(each, Send)]
    assert isinstance(ask, Ask)
    other.out.clear()
    other.on_ask("a", ask, 0.2)
    for each in other.out:
        assert isinstance(each, Send) and each.again
        match each.message:
            case Total():
                late.on_total("b", each.message, 1.1)
            case Segment():
                late.on_segment("b", each.message, 1.1)
    late.tick(2.0)
    (applied,) = [each for each in late.out if isinstance(each, Apply)]
    assert applied.mean.tolist() == [3.0] * LENGTH


def test_what_comes_for_a_step_that_was_begun_anew_is_not_added() -> None:
    """A connection that was slow would add to a vector that another step has by now."""
    memory = Lent()
    steps, other = new_steps("a", memory), new_steps("b", PlainMemory())
    first, second = (np.full(LENGTH, 1.0, np.float32) for _ in range(2))
    steps.on_contribution(3, 0, first, 0.0)
    other.on_contribution(3, 1, np.full(LENGTH, 2.0, np.float32), 0.0)
    (segment,) = segments_of(other)
    assert steps.place(replace(segment, digest="other")) is None
    assert steps.place(replace(segment, step=4)) is None
    assert steps.place(replace(segment, payload=bytes(4))) is None
    add = steps.place(segment)
    assert callable(add)
    add(0, memoryview(segment.payload)[:4])
    assert sorted(first) == [1.0] * LENGTH and steps.executor is not None  # it goes to the mean
    steps.stand_at(3, "digest", None)
    steps.begin(0.1)
    steps.on_contribution(3, 0, second, 0.1)
    before = steps.executor.mean.tobytes()
    add(4, memoryview(segment.payload)[4:])
    assert steps.executor.mean.tobytes() == before
    steps.on_segment("b", replace(segment, payload=b""), 0.2)
    assert not steps.executor.complete and steps.executor.total(segment.unit) is None
    add = steps.place(segment)
    assert callable(add)
    add(0, memoryview(segment.payload))
    steps.on_segment("b", replace(segment, payload=b""), 0.2)
    total = steps.executor.total(segment.unit)
    assert total is not None and total.tolist() == [3.0] * len(total)


def test_a_flood_of_the_next_step_is_kept_within_its_hops() -> None:
    """Whatever a peer sends: one segment for each hop, of what the schedule has."""
    steps, other = new_steps("a", PlainMemory()), new_steps("b", PlainMemory())
    other.stand_at(4, "later", None)
    other.begin(0.0)
    other.out.clear()
    other.on_contribution(4, 1, np.ones(LENGTH, np.float32), 0.0)
    good = segments_of(other)
    assert good
    kept = []
    for number in range(1000):
        for segment in good:
            for odd in (
                segment,
                replace(segment, round=number + 2),
                replace(segment, unit=number + 2),
                replace(segment, unit=-1),
                replace(segment, dst=number + 1),
                replace(segment, dst=-1),
                replace(segment, step=5 + number),
                replace(segment, payload=bytes(number * 4)),
            ):
                steps.on_segment("b", odd, 0.1)
        kept.append(len(steps._early))
    assert max(kept) <= len(good) + 1
    assert steps.ahead == (1004, "b")


def test_an_ask_for_too_much_is_answered_in_part() -> None:
    steps = new_steps("a", PlainMemory(), length=4 * ASK_LIMIT, segment_bytes=4)
    steps.on_contribution(3, 0, np.ones(4 * ASK_LIMIT, np.float32), 0.0)
    sent = segments_of(steps)
    assert len(sent) == 2 * ASK_LIMIT
    steps.out.clear()
    items = [number for each in sent for number in (each.round, each.unit, each.dst)]
    steps.on_ask("b", Ask(1, 3, (*items,) * 9), 0.1)
    assert len(segments_of(steps)) == ASK_LIMIT


class Slow:
    """Links on which something is on its way."""

    def __init__(self, *, arrives: bool = False, leaves: bool = False) -> None:
        self._arrives, self._leaves = arrives, leaves

    def arrives_from(self, peer: str) -> bool:
        return self._arrives

    def leaves_to(self, peer: str) -> bool:
        return self._leaves


def messages_of(steps: Steps, now: float) -> list[object]:
    steps.out.clear()
    steps.tick(now)
    return [each.message for each in steps.out if isinstance(each, Send)]


def test_what_is_on_its_way_is_not_asked_for() -> None:
    """It would be sent once more over a link that takes seconds for it as it is."""
    steps = new_steps("a", PlainMemory())
    steps.on_contribution(3, 0, np.ones(LENGTH, np.float32), 0.0)
    steps.underway = Slow(arrives=True)
    beats = [0.1 * beat for beat in range(1, 100)]
    assert [messages_of(steps, now) for now in beats] == [[]] * len(beats)
    steps.underway = Slow()
    (asked,) = messages_of(steps, 10.0)
    assert isinstance(asked, Ask)


def test_nobody_is_unreachable_of_whom_something_comes() -> None:
    accused: list[str] = []
    steps = new_steps("a", PlainMemory())
    steps._accuse = lambda peer, *_: accused.append(peer)
    steps.on_contribution(3, 0, np.ones(LENGTH, np.float32), 0.0)
    unanswered_s = steps.timing.unanswered_s
    steps.heard_at = 10.0
    messages_of(steps, 1.0)  # it asks, and the answer is long on its way
    steps.underway = Slow(arrives=True)
    messages_of(steps, 1.0 + 0.9 * unanswered_s)
    messages_of(steps, 1.0 + 1.1 * unanswered_s)
    assert accused == []
    steps.underway = Slow()
    messages_of(steps, 5.0)
    messages_of(steps, 5.0 + 1.1 * unanswered_s)
    assert accused == ["b"]


def test_what_is_on_its_way_is_not_sent_again() -> None:
    steps = new_steps("a", PlainMemory())
    steps.on_contribution(3, 0, np.ones(LENGTH, np.float32), 0.0)
    (sent,) = segments_of(steps)
    ask = Ask(1, 3, (sent.round, sent.unit, sent.dst))
    for underway, answer in ((Slow(leaves=True), NotYet), (Slow(), Segment)):
        steps.underway = underway
        steps.out.clear()
        steps.on_ask("b", ask, 0.1)
        assert [type(each.message) for each in steps.out if isinstance(each, Send)] == [answer]


def test_what_is_asked_for_again_and_again_is_sent_ever_less_often() -> None:
    """What is on its way through others does not show here; it must not be made longer by much."""
    steps = new_steps("a", PlainMemory())
    steps.on_contribution(3, 0, np.ones(LENGTH, np.float32), 0.0)
    (sent,) = segments_of(steps)
    sent_at, answered = [], 0
    for beat in range(1, 100):
        steps.out.clear()
        steps.on_ask("b", Ask(1, 3, (sent.round, sent.unit, sent.dst)), 0.1 * beat)
        answered += len(steps.out)
        sent_at += [beat for _ in segments_of(steps)]
    assert answered == 99, "who asks must not take it for unreachable"
    assert sent_at[:7] == [1, 3, 7, 15, 31, 51, 71] and len(sent_at) == 8
    steps.enter(View(2, "other", ("a", "b"), ("a", "b"), 2), 10.0)
    steps.out.clear()
    steps.on_ask("b", Ask(2, 3, (sent.round, sent.unit, sent.dst)), 10.1)
    assert len(segments_of(steps)) == 1


def test_what_was_sent_of_the_step_before_does_not_hold_up_this_one() -> None:
    """Nor where no further step is begun, as in a hand-over."""
    steps = new_steps("a", PlainMemory())
    ask = (0, 0, 0)
    for step in (4, 5):
        steps.stopped = True
        steps.stand_at(step, "digest", np.ones(LENGTH, np.float32))
        for beat, sent in ((1, 1), (2, 0), (3, 1), (5, 0)):
            steps.out.clear()
            steps.on_ask("b", Ask(1, step - 1, ask), step + 0.1001 * beat)
            kinds = [type(each.message) for each in steps.out if isinstance(each, Send)]
            assert kinds == [Total if sent else NotYet]


def test_a_total_is_sent_once_for_all_nodes_and_no_more_is_remembered() -> None:
    steps = new_steps("a", PlainMemory())
    steps.on_contribution(3, 0, np.ones(LENGTH, np.float32), 0.0)
    steps.on_total("b", Total(3, 0, "digest", np.ones(LENGTH // 2, np.float32).data.cast("B")), 0.0)
    steps.out.clear()
    steps.on_ask("b", Ask(1, 3, (0, 0, 0, 1, 0, 1, 0, 0, 1)), 0.1)
    assert [type(each.message) for each in steps.out if isinstance(each, Send)].count(Total) == 1
    steps.stand_at(4, "next", np.ones(LENGTH, np.float32))
    steps.out.clear()
    steps.on_ask("b", Ask(1, 3, (0, 900, 0, 1, -7, 1)), 0.1)
    assert [type(each.message) for each in steps.out if isinstance(each, Send)] == [NotYet]


def test_a_mean_that_is_on_its_way_is_not_sent_again() -> None:
    steps = new_steps("a", PlainMemory())
    steps.stand_at(4, "next", np.ones(LENGTH, np.float32))
    for underway, kinds in ((Slow(leaves=True), []), (Slow(), [Total, Total])):
        steps.underway = underway
        steps.out.clear()
        assert steps.on_want("b", Want(3, -1, "", ()), 0.1)
        assert [type(each.message) for each in steps.out if isinstance(each, Send)] == kinds


def test_a_vector_that_was_added_to_is_not_taken_again() -> None:
    """What was read has gone while the own contribution was on its way: it is computed anew."""
    memory = Lent()
    late, other = new_steps("a", memory), new_steps("b", PlainMemory())
    vector = np.full(LENGTH, 1.0, np.float32)
    late.on_part(3, 0, vector, 3, LENGTH, 0.0)  # the second chunk is handed out
    other.on_contribution(3, 1, np.full(LENGTH, 2.0, np.float32), 0.0)
    for segment in segments_of(other):
        late.on_segment("b", segment, 0.1)
    memory.gone = True
    for unit in range(2):
        total = np.full(3, 9.0, np.float32).data.cast("B")
        late.on_total("b", Total(3, unit, "digest", total), 0.2)
    assert [each for each in late.out if isinstance(each, Compute | Apply)] == [Compute(3, 0)]
    late.on_contribution(3, 0, vector, 0.3)
    assert [each for each in late.out if isinstance(each, Compute | Apply)] == [Compute(3, 0)] * 2
    memory.gone = False
    late.on_contribution(3, 0, np.full(LENGTH, 1.0, np.float32), 0.4)
    for unit in range(2):
        late.on_total(
            "b", Total(3, unit, "digest", np.full(3, 3.0, np.float32).data.cast("B")), 0.5
        )
    (applied,) = [each for each in late.out if isinstance(each, Apply)]
    assert applied.mean.tolist() == [3.0] * LENGTH


def test_a_step_that_is_being_applied_is_not_begun_again() -> None:
    """What was lent may go as soon as the sum is judged."""
    memory = Lent()
    late = new_steps("a", memory)
    late.on_contribution(3, 0, np.full(LENGTH, 1.0, np.float32), 0.0)
    for unit in range(2):
        late.on_total(
            "b", Total(3, unit, "digest", np.full(3, 3.0, np.float32).data.cast("B")), 0.1
        )
    memory.gone = True
    late.enter(replace(VIEW, number=2, id="later", players=("a", "a")), 0.2)
    assert late.applying and late.executor is not None and late.executor.complete
    assert sum(isinstance(each, Apply) for each in late.out) == 1
