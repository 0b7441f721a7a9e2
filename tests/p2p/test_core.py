"""What a member says at a beat, and whether it makes contact with the registry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fault.records import Accusation, Doing, Grant, Outcome, Snapshot, Suspect, Timing, View
from p2p.actions import Send
from p2p.collectives.schedule import make_schedule, make_units
from p2p.core import CALM_BEATS, Core
from p2p.messages import Beat, Segment, ViewIs, Want
from p2p.steps import Shape

ME, OTHER = "0.1.aa", "1.1.bb"
VIEW = View(1, "view", (ME, OTHER), (ME, OTHER), 2)
TIMING = Timing()
LENGTH = 8


def grant(slot: int, claimant: str) -> Grant:
    return Grant(slot, 1, "token", 0.0, 30.0, claimant, 0.0, 0)


WELL = Snapshot(
    life="life",
    born="life",
    now=1.0,
    view=VIEW,
    leased=frozenset((ME, OTHER)),
    ready={},
    accusations=(),
    grants={0: grant(0, ME), 1: grant(1, OTHER)},
    doing={ME: Doing(), OTHER: Doing()},
    departed=frozenset(),
    suspects=(),
    outcome=None,
    checkpoint=0,
    target_slots=2,
    highest_view=1,
)


def new_member(snapshot: Snapshot = WELL) -> Core:
    """At 1.0, at the beginning of step 3, the registry's answer just read."""
    schedule = make_schedule("ring", 2)
    shape = Shape(2, 99, schedule, make_units(LENGTH, schedule.chunks, 1 << 20), LENGTH)
    core = Core(ME, shape, TIMING, lambda: "id")
    core.begin(0.9)
    core.on_loaded(3, "digest", 0.9)
    core.on_message(OTHER, ViewIs(VIEW), 1.0)
    core.contact(1.0)
    core.on_snapshot(snapshot, 1.0)
    core.out.clear()
    return core


def sent(core: Core, kind: type) -> list[str]:
    """To whom messages of this kind went since the last time."""
    actions, core.out[:] = list(core.out), []
    return [each.to for each in actions if isinstance(each, Send) and type(each.message) is kind]


def test_a_segment_stands_in_for_the_next_beat() -> None:
    core = new_member()
    core.tick(1.0)
    assert sent(core, Beat) == [OTHER]
    core.on_contribution(3, 0, np.ones(LENGTH, np.float32), 1.06)
    assert OTHER in sent(core, Segment)
    core.tick(1.1)
    assert sent(core, Beat) == []
    core.tick(1.2)
    assert sent(core, Beat) == [OTHER]


def test_of_a_step_no_more_than_one_beat_is_left_out() -> None:
    """Its parts go out one after another; whether any arrives is not known before the next step."""
    core = new_member()
    core.tick(1.0)
    core.out.clear()
    beats = []
    for tick in range(4):
        now = 1.1 + tick * TIMING.beat_s
        core.steps.sent_at[OTHER] = now - 0.01
        core.tick(now)
        beats.append(sent(core, Beat))
    assert beats == [[], [OTHER], [OTHER], [OTHER]]
    core.on_loaded(4, "next", 1.5)
    core.steps.sent_at[OTHER] = 1.5
    core.tick(1.5)
    assert sent(core, Beat) == []


@pytest.mark.parametrize(("began_at", "accuses"), [(1.0, True), (1.35, False)])
def test_a_segment_that_was_long_on_its_way_is_no_sign_of_life(
    began_at: float, accuses: bool
) -> None:
    """Its peer may be dead by now, and a relay deliver what it still has of a step."""
    core = new_member()
    core.on_message(OTHER, Beat(1, 3, "digest", 0, -1), 1.0)
    core.on_message("2.1.cc", Beat(1, 3, "digest", 0, -1), 1.0)
    core.steps.began_at = began_at
    payload = np.ones(LENGTH // 2, np.float32).data.cast("B")
    for beat in range(1, 8):
        now = 1.0 + beat * TIMING.beat_s
        core.on_message(OTHER, Segment(1, 3, 0, 0, 0, "digest", payload), now)
        core.membership.suspicion.tick(0.0, lambda peer: True, now)
    assert bool(core.membership.suspicion.accusations(1.7)) is accuses


def beats_until_contact(core: Core, moved_at: float = 0.0) -> int:
    """With a step that got on last at this time, or does at every beat."""
    core.steps.began_at = 1.01
    for beat in range(1, 10):
        now = 1.0 + beat * TIMING.beat_s
        core.steps.moved_at = moved_at or now - 0.01
        if core.contact_is_due(now):
            return beat
    raise AssertionError("it never makes contact")


def test_a_member_whose_run_goes_well_makes_contact_seldom() -> None:
    assert beats_until_contact(new_member()) == CALM_BEATS
    scaled = replace(WELL, grants={**WELL.grants, 2: grant(2, "2.1.cc")})
    assert beats_until_contact(new_member(scaled)) == CALM_BEATS


def test_whoever_waits_for_others_makes_contact_at_every_beat() -> None:
    core = new_member()
    core.steps.computing = -1
    core.contact(1.0)
    assert beats_until_contact(core, moved_at=1.05) == 2


def test_what_takes_long_is_told_once() -> None:
    """Should the peer die of it, the registry has to know what it was at."""
    core = new_member()
    assert core.steps.computing == 0
    assert beats_until_contact(core, moved_at=1.0) == CALM_BEATS  # it was told at 1.0
    core.steps.computing = 1
    assert beats_until_contact(core, moved_at=1.0) == 2
    core.contact(1.2)
    assert not core.contact_is_due(1.4)
    assert core.contact_is_due(1.5)


@pytest.mark.parametrize(
    "odd",
    [
        replace(WELL, view=replace(VIEW, number=0)),
        replace(WELL, leased=frozenset((ME,))),
        replace(WELL, accusations=(Accusation(OTHER, ME, "silent"),)),
        replace(WELL, grants={0: grant(0, ME), 1: grant(1, "1.2.cc")}),
        replace(WELL, grants={**WELL.grants, 1: grant(1, "")}),
        replace(WELL, suspects=(Suspect(0, 3, ()),)),
        replace(WELL, checkpoint=-1),
        replace(WELL, target_slots=3),
    ],
    ids=["view", "lease", "accused", "comes", "granted", "suspected", "checkpoint", "slots"],
)
def test_whatever_is_not_as_it_should_be_brings_contact_at_the_next_beat(odd: Snapshot) -> None:
    assert beats_until_contact(new_member(odd)) == 1


def test_whoever_has_something_to_tell_makes_contact_at_the_next_beat() -> None:
    core = new_member()
    core.membership.suspicion.accuse(OTHER, "hung", 1.0)
    assert beats_until_contact(core) == 1
    core = new_member()
    core.on_contact_failed(1.0)
    assert beats_until_contact(core) == 1
    core = new_member()
    core.fail(Outcome("failed", 3, "", "RunFailed", "it raised"), 1.0)
    assert beats_until_contact(core) == 1
    core = new_member()
    core.membership.deadline = 1.2
    assert beats_until_contact(core) == 1
    candidate = Core("0.2.dd", core.shape, TIMING, lambda: "id")
    candidate.begin(1.0)
    candidate.contact(1.0)
    candidate.on_snapshot(WELL, 1.0)
    assert beats_until_contact(candidate) == 1


class Arriving:
    """Links over which something large is just coming in from everyone."""

    def arrives_from(self, peer: str) -> bool:
        return True

    def leaves_to(self, peer: str) -> bool:
        return False


def test_who_is_behind_wants_nothing_while_something_comes() -> None:
    """It may be what is lacking; when it has stopped, it is wanted."""
    core = new_member()
    core.steps.computing = -1
    nothing_underway = core.steps.underway
    for underway, wanted in ((Arriving(), []), (nothing_underway, [OTHER])):
        core.steps.underway = underway
        core.steps.ahead = (9, OTHER)
        core.out.clear()
        core._catch_up(100.0 + len(wanted))
        assert sent(core, Want) == wanted
