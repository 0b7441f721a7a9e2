"""Deadlines, and the death of anything that a run consists of: the weights stay the same bits.

The matrix plays each fault alone; the pairs, drawn at random, play two of them in one run.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from chaos.live import (
    Fault,
    Kill,
    KillEverything,
    KillInHandOver,
    KillPart,
    LoseRegistry,
    Result,
    Scale,
    Workload,
)
from tests.workloads import workload_of

WORKLOADS = {
    f"{job}-{collective}": workload_of(job, steps, collective)
    for job, steps, collective in (
        *(("digits", 600, "direct"), ("digits", 600, "butterfly")),
        *(("wide", 250, "ring"), ("charlm", 160, "ring")),
    )
}
PAIRS = 100
Play = Callable[..., Result]
Reference = Callable[[Workload], Result]
Faults = tuple[Fault, ...]


def life_s(length_s: float) -> float:
    """So short that every slot hands over twice or more in a run of this length, if it can be."""
    return max(6.0, 0.4 * length_s)


def due_often(length_s: float, *more: str) -> tuple[str, ...]:
    return ("--time-limit", f"{life_s(length_s):.1f}", *more)


AT_ONCE = ("--timing", "handover_stagger=0")
PHASES = {"invited": 0.0, "booting": 0.1, "following": 0.5, "swapping": 1.5}


def alone(steps: int) -> dict[str, Faults]:
    """Each fault by itself, by name, in a run of so many steps."""
    early, middle = steps // 10, steps // 3
    return {
        "relay": (KillPart(middle, ("relay-0",)),),
        "relays": (KillPart(middle, ("relay-0", "relay-1")),),
        "registry": (KillPart(middle, ("registry",)),),
        "registry-empty": (LoseRegistry(middle),),
        "registry-older": (Kill(early, (1,)), LoseRegistry(early + 5, older_s=1.5)),
        "launcher": (KillPart(middle, ("launcher",)),),
        "emulator": (KillPart(middle, ("emulator",)),),
        "everything": (KillEverything(middle),),
        "scale": tuple(
            Scale(early + index * (middle - early) // 4, slots)
            for index, slots in enumerate((2, 4, 1, 3))
        ),
    }


def in_hand_over(steps: int) -> dict[str, Faults]:
    """The old peer, the successor or both die, in each phase of a hand-over."""
    return {
        f"{which}-{phase}": (KillInHandOver(steps // 10, slot, which, after_s),)
        for slot, (phase, after_s) in enumerate(PHASES.items())
        for which in ("old", "new", "both")
    }


def pair(number: int, steps: int) -> Faults:
    """Two faults of those above, at random steps."""
    draw = random.Random(number)
    found: list[Fault] = []
    for _ in range(2):
        step = draw.randrange(steps // 10, steps * 3 // 4)
        slots = tuple(sorted(draw.sample(range(4), draw.choice((1, 1, 2, 3)))))
        found.append(
            draw.choice(
                (
                    Kill(step, slots, draw.random() * 0.1),
                    KillInHandOver(
                        step, slots[0], draw.choice(("old", "new", "both")), draw.random() * 1.5
                    ),
                    KillPart(step, (draw.choice(("relay-0", "relay-1")),)),
                    KillPart(step, ("relay-0", "relay-1")),
                    KillPart(step, ("registry",)),
                    KillPart(step, ("launcher",)),
                    KillPart(step, ("emulator",)),
                    LoseRegistry(step),
                    LoseRegistry(step, older_s=draw.random() * 2),
                    KillEverything(step),
                    Scale(step, draw.randint(1, 4)),
                )
            )
        )
    return tuple(found)


def scenarios() -> list[object]:
    """(workload, name) of all; a few are part of every test run."""
    always = {("digits-direct", "hand-overs"), ("digits-direct", "everything")}
    found = []
    for workload, each in WORKLOADS.items():
        names = ["hand-overs", "hand-overs-at-once", *alone(each.steps), *in_hand_over(each.steps)]
        for name in names:
            marks = [] if (workload, name) in always else [pytest.mark.acceptance]
            found.append(pytest.param(workload, name, marks=marks, id=f"{name}-{workload}"))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workload", "name"), scenarios())
def test_nothing_that_dies_is_missed(
    workload: str, name: str, run: Play, reference: Reference
) -> None:
    """Not one bit of the result changes."""
    chosen = WORKLOADS[workload]
    whole = reference(chosen)
    options: tuple[str, ...] = ("--relays", "2")
    faults = {**alone(chosen.steps), **in_hand_over(chosen.steps)}.get(name, ())
    if name.startswith("hand-overs") or name in in_hand_over(chosen.steps):
        options = due_often(whole.summary["wall_s"], *options)
    if name == "hand-overs-at-once":
        options = (*options, *AT_ONCE)
    result = run(chosen, name, *faults, options=options)
    assert result.weights == whole.weights
    if name.startswith("hand-overs"):
        assert result.summary["handovers"] >= 6


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("at_once", [False, True], ids=["staggered", "at-once"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_nobody_dies_of_a_deadline(
    workload: str, at_once: bool, run: Play, reference: Reference
) -> None:
    """Each life that ends is handed over, on a machine that has time for its successor's start."""
    chosen = WORKLOADS[workload]
    whole = reference(chosen)
    options = due_often(whole.summary["wall_s"], *(AT_ONCE if at_once else ()))
    result = run(chosen, f"deadlines-{at_once}", options=options)
    lives = result.summary["wall_s"] // life_s(whole.summary["wall_s"])
    assert result.weights == whole.weights
    assert result.summary["handovers"] >= 4 * lives
    assert result.summary["deaths"] == 0


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(PAIRS))
def test_two_faults_at_random(number: int, run: Play, reference: Reference) -> None:
    """Pairs of all these in one run, while hand-overs go on."""
    work = list(WORKLOADS.values())[number % len(WORKLOADS)]
    whole = reference(work)
    options = due_often(whole.summary["wall_s"], "--relays", "2")
    if number % 3 == 0:
        options = (*options, *AT_ONCE)
    result = run(work, f"pair-{number}", *pair(number, work.steps), options=options)
    assert result.weights == whole.weights
