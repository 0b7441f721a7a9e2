"""How early a successor is invited."""

from __future__ import annotations

import itertools

from fault.records import Timing
from fault.succession import LIFE_SHARE, lead_s

TIMING = Timing(handover_margin_s=1.0)


def lead(timing: Timing = TIMING, **changed: float) -> float:
    values = {"boot_s": 2.0, "step_s": 0.1, "life_s": 900.0, "slot": 0, "slots": 4, **changed}
    return lead_s(
        timing,
        values["boot_s"],
        values["step_s"],
        values["life_s"],
        int(values["slot"]),
        int(values["slots"]),
        bool(values.get("alone", False)),
    )


def test_early_enough_for_a_start_and_a_step() -> None:
    """More than the start took, more for slow steps, more for who is alone."""
    assert lead() > 2.0 + 1.0
    assert lead(step_s=10.0) > lead() + 10.0
    assert lead(alone=True) == 2 * lead()


def test_slots_that_are_due_together_are_spread() -> None:
    """By a start each; not at all if that was asked for."""
    leads = [lead(slot=slot) for slot in range(4)]
    apart = [round(later - earlier, 6) for earlier, later in itertools.pairwise(leads)]
    assert apart == [2.0] * 3
    at_once = Timing(handover_margin_s=1.0, handover_stagger=0.0)
    assert len({lead(at_once, slot=slot) for slot in range(4)}) == 1


def test_a_short_life_is_not_all_succession() -> None:
    """However slow the starts, the first part of a life is left in peace."""
    assert lead(boot_s=30.0, life_s=20.0, slot=3) == LIFE_SHARE * 20.0


def test_never_if_so_configured() -> None:
    """A negative margin leaves every deadline to be a death."""
    assert lead(Timing(handover_margin_s=-1.0)) < 0
