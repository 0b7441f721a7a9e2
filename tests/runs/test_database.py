"""Gradients summed and applied in a store: the weights do not depend on who dies, or where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.live import Fault, Kill, KillEverything, KillPart, KillWorkers, Result, Workload

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
STEPS = 240
WORK = Workload(JOB, STEPS, "ring", shards=2)
DATABASE = ("--peers", "2", "--workers", "2", "--aggregate", "database")
Play = Callable[..., Result]

SCENARIOS: dict[str, tuple[tuple[Fault, ...], tuple[str, ...]]] = {
    "a-worker": ((KillWorkers(60, 0, (1,)),), ()),
    "all-workers-of-a-peer": ((KillWorkers(60, 1, (0, 1)),), ()),
    "a-lead": ((Kill(60, (0,)),), ()),
    "lead-and-workers": ((Kill(60, (1,)), KillWorkers(61, 1, (0, 1))), ()),
    "both-leads": ((Kill(60, (0, 1)),), ()),
    "the-store": ((KillPart(60, ("store-0",)),), ()),
    "the-store-twice": ((KillPart(60, ("store-0",)), KillPart(150, ("store-0",))), ()),
    "stores-per-peer": ((), ("--stores", "per-peer")),
    "one-of-two-stores": ((KillPart(60, ("store-1",)),), ("--stores", "per-peer")),
    "everything": ((KillEverything(120),), ()),
}
IN_EVERY_TEST_RUN = {"a-worker", "the-store"}


@pytest.fixture(scope="session")
def reference(run: Play) -> Result:
    """The run in which nothing fails."""
    return run(WORK, "database-reference", options=DATABASE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_TEST_RUN else [pytest.mark.acceptance])
        for name in SCENARIOS
    ],
)
def test_the_weights_are_those_of_a_run_without_faults(
    scenario: str, run: Play, reference: Result
) -> None:
    """Killed workers, leads and stores, and where the stores are, change not one bit."""
    faults, options = SCENARIOS[scenario]
    result = run(WORK, f"database-{scenario}", *faults, options=(*DATABASE, *options))
    assert result.weights == reference.weights
    assert result.summary["steps"] == STEPS
    assert result.summary["metrics"]["accuracy"] >= 0.95


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_time_limits_change_nothing(run: Play) -> None:
    """Leads hand over and workers are replaced, again and again; the weights are the same."""
    work = Workload(JOB, 1500, "ring", shards=2)
    calm = run(work, "database-calm", options=DATABASE)
    short = run(work, "database-time-limits", options=(*DATABASE, "--time-limit", "15"))
    assert calm.summary["handovers"] == 0 and short.summary["handovers"] >= 2
    assert short.weights == calm.weights
