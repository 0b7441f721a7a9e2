"""What the benchmarks make of the moments at which steps were finished."""

from __future__ import annotations

import pytest

from benchmarks.goodput import pace
from benchmarks.recovery import SETTLED_S, judge

Steps = list[tuple[float, int]]
CALM: Steps = [(step / 10, step) for step in range(1, 51)]
"""A step every 0.1 s; the kill is at 5.05 s, after step 50."""
KILLED_AT = 5.05


def going_on(at: float, step: int) -> Steps:
    return [(at + ahead / 10, step + ahead) for ahead in range(60)]


@pytest.mark.parametrize(
    ("after", "next_s", "recovery_s", "beyond_s", "lost"),
    [
        pytest.param(going_on(5.5, 51), 0.45, 0.45, 0.55, 0, id="goes-on"),
        pytest.param([(5.1, 51), *going_on(5.6, 52)], 0.05, 0.55, 0.55, 0, id="one-on-its-way"),
        pytest.param(going_on(9.05, 41), 5.0, 4.0, 5.1, 10, id="back-to-a-checkpoint"),
    ],
)
def test_what_a_kill_cost(
    after: Steps, next_s: float, recovery_s: float, beyond_s: float, lost: int
) -> None:
    """Times are from the kill; steps that were finished before and are finished again are lost."""
    cost = judge([*CALM, *after], KILLED_AT, now=20.0)
    assert cost is not None
    found = (cost["next_s"], cost["recovery_s"], cost["beyond_s"])
    assert found == pytest.approx((next_s, recovery_s, beyond_s))
    assert cost["steps_lost"] == lost


def test_a_kill_is_not_judged_too_early() -> None:
    """Nothing is said before new steps came, nor before the pause is surely over."""
    steps = [*CALM, *going_on(5.5, 51)]
    assert judge(CALM, KILLED_AT, now=60.0) is None
    assert judge([*CALM, *going_on(9.0, 1)[:40]], KILLED_AT, now=60.0) is None
    assert judge(steps, KILLED_AT, now=5.6 + SETTLED_S - 0.1) is None
    assert judge(steps, KILLED_AT, now=5.6 + SETTLED_S + 0.1) is not None


def test_steps_that_are_computed_again_are_no_goodput() -> None:
    """Only what goes beyond the newest step counts."""
    again = [(5.1 + step / 100, step) for step in range(30, 51)]
    assert pace([*CALM, *again], 1.0, 11.0)["steps"] == 40


def test_a_hang_counts_with_and_without() -> None:
    """Its time has no steps in it, and is left out in the second rate."""
    found = pace(CALM, 1.0, 45.0)
    assert found["steps"] == 40 and found["hung_s"] == pytest.approx(40.0)
    assert found["steps_per_s"] == pytest.approx(40 / 44, abs=1e-3)
    assert found["steps_per_s_without_hangs"] == pytest.approx(10.0, abs=1e-3)


def test_a_step_that_is_begun_at_the_end_slows_nothing_down() -> None:
    """Of long steps there are few in a stretch: the part of one more would be a large share."""
    found = pace([(2.0 * step, step) for step in range(1, 9)], 2.0, 13.9)
    assert found["steps"] == 5 and found["whole_steps_per_s"] == 0.5


def test_all_of_it_a_hang() -> None:
    """No rate can be given without the hang, and none is."""
    found = pace([(1.0, 7)], 1.0, 41.0)
    assert found["steps_per_s"] == 0.0 and found["steps_per_s_without_hangs"] is None
    assert found["whole_steps_per_s"] is None
