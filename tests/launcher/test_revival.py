"""What keeps a run going without members, and what gives it up."""

from __future__ import annotations

from dataclasses import replace

from fault.records import Grant, Outcome, Snapshot, Timing, View
from launcher.revival import Boots, Revival, Standstill, open_slots

TIMING = Timing()
MEMBER = "0.1.aa"
GRANT = Grant(0, 1, "token", 0.0, 30.0, claimant=MEMBER, claimed_at=0.0)
ALIVE = Snapshot(
    life="a",
    born="a",
    now=100.0,
    view=View(0, "id", (MEMBER,), (MEMBER,), 1),
    leased=frozenset({MEMBER}),
    ready={},
    accusations=(),
    grants={0: GRANT},
    doing={},
    departed=frozenset(),
    suspects=(),
    outcome=None,
    checkpoint=-1,
    target_slots=1,
    highest_view=0,
)
DEAD = replace(ALIVE, leased=frozenset())
DEPARTED = replace(DEAD, departed=frozenset({MEMBER}))


def test_a_run_with_a_member_is_left_alone() -> None:
    """Members fill the slots themselves."""
    revival = Revival(TIMING)
    assert revival.slots_to_grant(ALIVE, 0.0) == revival.slots_to_grant(ALIVE, 1000.0) == []


def test_silence_is_waited_out_for_three_leases() -> None:
    """A member that was only cut off for a moment must find its run as it was."""
    revival = Revival(TIMING)
    assert revival.slots_to_grant(DEAD, 0.0) == []
    assert revival.slots_to_grant(DEAD, 3 * TIMING.lease_ttl_s - 0.1) == []
    assert revival.slots_to_grant(DEAD, 3 * TIMING.lease_ttl_s) == [(0, 2)]


def test_an_outage_of_the_registry_starts_the_wait_again() -> None:
    """What it said before counts no more."""
    revival = Revival(TIMING)
    revival.slots_to_grant(DEAD, 0.0)
    revival.outage()
    assert revival.slots_to_grant(DEAD, 100.0) == []


def test_members_that_said_goodbye_are_not_waited_for() -> None:
    """Nobody of them can come back."""
    assert Revival(TIMING).slots_to_grant(DEPARTED, 0.0) == [(0, 2)]


def test_a_run_that_has_ended_is_never_revived() -> None:
    """The outcome stands."""
    ended = replace(DEPARTED, outcome=Outcome("stopped", 0))
    assert Revival(TIMING).slots_to_grant(ended, 1000.0) == []


def test_only_slots_that_nobody_can_claim_are_open() -> None:
    """A fresh grant is somebody's who is on the way."""
    unclaimed = replace(DEAD, grants={0: replace(GRANT, claimant="", expires_at=101.0)})
    assert open_slots(unclaimed, TIMING) == []
    assert open_slots(replace(unclaimed, now=101.0), TIMING) == [(0, 2)]
    assert open_slots(replace(DEAD, grants={}), TIMING) == [(0, 1)]


def test_boots_that_fail_in_a_row_end_a_run() -> None:
    """Three for each slot, told with the reason of one that had something to say."""
    boots = Boots()
    for generation in range(1, 4):
        assert boots.verdict(1, members_left=False) is None
        boots.failed(f"0.{generation}", "it crashed")
    boots.failed("0.3", "a file is missing", "TaskRaised", "the trace")
    assert boots.verdict(1, members_left=True) is None
    verdict = boots.verdict(1, members_left=False)
    assert verdict is not None and verdict.error == "TaskRaised"
    assert "a file is missing" in verdict.reason and verdict.trace == "the trace"


def test_a_peer_that_joined_did_not_fail_to_boot() -> None:
    """Its later end is a death; and a join proves that booting works."""
    boots = Boots()
    for generation in range(1, 3):
        boots.failed(f"0.{generation}", "it crashed")
    boots.joined(("0.3.aa",))
    boots.failed("0.3", "it was killed")
    boots.failed("0.4", "it crashed")
    assert boots.verdict(1, members_left=False) is None


def test_memory_deaths_without_a_new_step_end_a_run() -> None:
    """One for each slot and two more; a step that is reached clears them."""
    deaths = Standstill()
    deaths.died("0.1.aa", "out of memory", 5)
    deaths.died("0.1.aa", "out of memory", 5)
    deaths.died("0.2.aa", "out of memory", 5)
    assert deaths.verdict(1, 5) is None
    deaths.died("0.3.aa", "out of memory", 5)
    verdict = deaths.verdict(1, 5)
    assert verdict is not None and verdict.error == "OutOfMemory" and verdict.step == 5
    assert deaths.verdict(1, 6) is None
    deaths.died("0.4.aa", "out of memory", 6)
    assert deaths.verdict(1, 6) is None


def test_crashes_without_a_new_step_end_a_run_later() -> None:
    """Somebody may be killing processes on purpose, so it takes twice as many and two more."""
    deaths = Standstill()
    for generation in range(1, 6):
        deaths.died(f"0.{generation}.aa", "crash", 5)
    assert deaths.verdict(1, 5) is None
    deaths.died("0.6.aa", "crash", 5)
    verdict = deaths.verdict(1, 5)
    assert verdict is not None and verdict.error == "Poisoned"
    deaths.died("0.7.aa", "crash", 6)
    assert deaths.verdict(1, 6) is None
