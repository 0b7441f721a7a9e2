"""One oracle for every fault: the final weights are, bit for bit, those of a run without any."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.live import DeliverTwice, Fault, Kill, Pause, Result, play

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
STEPS = 400
COLLECTIVES = ("ring", "butterfly")

Play = Callable[..., Result]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run(home: Path) -> Play:
    """Plays a run of digits with four shards and returns its result."""

    def start(
        name: str,
        collective: str,
        *faults: Fault,
        steps: int = STEPS,
        options: tuple[str, ...] = (),
    ) -> Result:
        chosen = ["--shards", "4", "--collective", collective, "--set", f"steps={steps}", *options]
        return play(JOB, home, f"{name}-{collective}", chosen, faults)

    return start


@pytest.fixture(scope="session")
def reference(run: Play) -> Callable[[str], str]:
    """The weights of a collective's run in which nothing fails."""
    known: dict[str, str] = {}

    def weights(collective: str) -> str:
        if collective not in known:
            result = run("reference", collective)
            assert result.summary["deaths"] == 0 and result.summary["steps"] == STEPS
            assert result.summary["metrics"]["accuracy"] >= 0.95
            known[collective] = result.weights
        return known[collective]

    return weights


def random_kill(number: int) -> tuple[Fault, ...]:
    draw = random.Random(number)
    step = draw.randrange(5, STEPS - 40)
    return (Kill(step, (draw.randrange(4),), draw.random() * 0.02),)


SCENARIOS: dict[str, tuple[tuple[Fault, ...], tuple[str, ...]]] = {
    "two-at-once": ((Kill(50, (1, 2)),), ()),
    "neighbours-one-after-another": ((Kill(50, (1,)), Kill(56, (2,))), ()),
    "all-but-one": ((Kill(60, (0, 1, 3)),), ()),
    "the-first-twice": ((Kill(40, (0,)), Kill(250, (0,))), ()),
    **{f"pause-{slot}": ((Pause(50, slot),), ()) for slot in range(4)},
    "everyone": ((Kill(120, (0, 1, 2, 3)),), ()),
    "time-limit": ((), ("--time-limit", "13")),
    "one-peer": ((), ("--peers", "1")),
    "two-peers": ((Kill(50, (1,)),), ("--peers", "2")),
    "three-peers": ((Kill(50, (0,)),), ("--peers", "3")),
    "delivered-twice": ((DeliverTwice(40, 2),), ()),
    **{f"kill-{number}": (random_kill(number), ()) for number in range(20)},
}
IN_EVERY_TEST_RUN = {("all-but-one", "ring"), ("two-peers", "butterfly"), ("pause-1", "ring")}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("scenario", "collective"),
    [
        pytest.param(
            scenario,
            collective,
            marks=[] if (scenario, collective) in IN_EVERY_TEST_RUN else [pytest.mark.acceptance],
        )
        for collective in COLLECTIVES
        for scenario in SCENARIOS
    ],
)
def test_the_weights_are_those_of_a_run_without_faults(
    scenario: str, collective: str, run: Play, reference: Callable[[str], str]
) -> None:
    """Whatever happens to the peers, not one bit of the result changes."""
    faults, options = SCENARIOS[scenario]
    result = run(scenario, collective, *faults, options=options)
    assert result.weights == reference(collective)
    assert result.summary["steps"] == STEPS


def test_the_collectives_differ_in_the_last_bits(reference: Callable[[str], str]) -> None:
    """Float sums depend on their order, so each collective has a reference of its own."""
    assert reference("ring") != reference("butterfly")
