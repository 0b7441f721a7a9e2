"""Following a member: every mean, in order, whatever gets lost, and never more than is kept."""

from __future__ import annotations

import random

import numpy as np
import pytest

from p2p.actions import Apply, Send
from p2p.collectives.memory import Vector
from p2p.collectives.schedule import make_schedule, make_units
from p2p.following import FOLLOWER_LIFE_S, WINDOW_UNITS, Follower, Leader
from p2p.messages import Follow, Total
from p2p.steps import Shape

MEMBER, CANDIDATE = "0.1.aa", "1.2.bb"


def shape(units: int) -> Shape:
    schedule = make_schedule("ring", 2)
    length = schedule.chunks * units
    return Shape(2, 100, schedule, make_units(length, schedule.chunks, 4), length)


def mean(step: int, length: int) -> Vector:
    return np.random.default_rng(step).standard_normal(length).astype(np.float32)


class Pair:
    """A leader and a follower with a wire between them that loses messages."""

    def __init__(self, units: int, loss: float = 0.0) -> None:
        self.shape = shape(units)
        self.draw, self.loss = random.Random(1), loss
        self.leader_out: list[object] = []
        self.follower_out: list[object] = []
        self.leader = Leader(self.shape, self.leader_out)
        self.follower = Follower(self.shape, self.follower_out)
        self.leading, self.following = 0, 0
        self.applied: list[Vector] = []
        self.most_on_the_way = 0

    def make_mean(self) -> None:
        self.leader.on_mean(self.leading, str(self.leading), mean(self.leading, self.shape.length))
        self.leading += 1

    def say(self, word: Follow, now: float = 0.0) -> bool:
        return self.leader.on_follow(CANDIDATE, word, self.leading, False, now)

    def exchange(self) -> None:
        """Carries what there is to and fro until nothing is left."""
        while self.leader_out or self.follower_out:
            self.most_on_the_way = max(self.most_on_the_way, len(self.leader_out))
            sent, self.leader_out[:] = list(self.leader_out), []
            for action in sent:
                assert isinstance(action, Send) and isinstance(action.message, Total)
                if self.draw.random() >= self.loss:
                    self.follower.on_total(MEMBER, action.message)
            asked, self.follower_out[:] = list(self.follower_out), []
            for action in asked:
                if isinstance(action, Apply):
                    self.applied.append(action.mean)
                    self.following += 1
                    self.follower.stand_at(self.following, str(self.following))
                    self.say(self.follower.word())
                elif isinstance(action, Send) and self.draw.random() >= self.loss:
                    assert isinstance(action.message, Follow)
                    self.say(action.message)


@pytest.mark.parametrize("units", [1, 20, 70])
@pytest.mark.parametrize("loss", [0.0, 0.4])
def test_every_mean_arrives(units: int, loss: float) -> None:
    """In order and whole, a window at a time, though words and units get lost."""
    pair = Pair(units, loss)
    pair.leader.expect(CANDIDATE, 0.0)
    for _ in range(5):
        pair.make_mean()
    pair.follower.stand_at(0, "0")
    for _ in range(300):
        pair.say(pair.follower.word())
        pair.exchange()
    assert pair.following == 5
    for step, applied in enumerate(pair.applied):
        assert np.array_equal(applied, mean(step, pair.shape.length))
    assert pair.most_on_the_way <= WINDOW_UNITS


def test_a_mean_is_sent_as_soon_as_it_is_whole() -> None:
    """Who stands at the step need not ask again."""
    pair = Pair(2)
    pair.follower.stand_at(0, "0")
    assert pair.say(pair.follower.word())
    assert not pair.leader_out
    pair.make_mean()
    pair.exchange()
    assert pair.following == 1


def test_who_is_too_far_behind_needs_a_state() -> None:
    """Without a follower one mean is kept; and a follower that fell silent is forgotten."""
    pair = Pair(1)
    for _ in range(4):
        pair.make_mean()
    assert not pair.say(Follow(1, "1", ()))
    assert pair.say(Follow(3, "3", ()))
    pair.leader.tick(FOLLOWER_LIFE_S + 1)
    pair.make_mean()
    pair.make_mean()
    assert not pair.leader.covers(3) and pair.leader.covers(5)


def test_another_state_of_the_same_step_is_not_followed() -> None:
    """Its mean would lead to yet another state; it needs a whole one."""
    pair = Pair(1)
    pair.leader.expect(CANDIDATE, 0.0)
    pair.make_mean()
    assert not pair.say(Follow(0, "corrupt", ()))
    pair.follower.stand_at(0, "corrupt")
    pair.follower.on_total(MEMBER, Total(0, 0, "0", b"\0" * 4))
    assert not pair.follower_out


def test_over_a_busy_way_nothing_is_sent_again() -> None:
    pair = Pair(2)
    pair.make_mean()
    word = Follow(0, "0", ())
    for is_busy, sent in ((True, 0), (False, len(pair.shape.units))):
        assert pair.leader.on_follow(CANDIDATE, word, pair.leading, is_busy, 0.0)
        assert len(pair.leader_out) == sent


def test_who_takes_a_state_for_long_is_waited_for() -> None:
    """The means since that state are kept for it, as long as it is heard."""
    pair = Pair(1)
    for tenth in range(100):
        now = tenth / 10
        if tenth % 2 == 0:
            pair.leader.expect(CANDIDATE, now)
        pair.leader.tick(now)
        if tenth % 10 == 0:
            pair.make_mean()
    assert pair.say(Follow(0, "0", ()), 10.0)
