"""One oracle for every fault: the final weights are, bit for bit, those of a run without any."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.live import DeliverTwice, Fault, Kill, Pause, Result, Workload
from tests.workloads import workload_of

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
STEPS = 400
STEPS_OF_COLD_STARTS = 100
"""The evaluation after each epoch starts cold as well."""
COLLECTIVES = ("ring", "butterfly", "direct")
Play = Callable[..., Result]
Reference = Callable[[Workload], Result]


def digits(collective: str, steps: int = STEPS) -> Workload:
    return Workload(JOB, steps, collective)


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
    "one-peer": ((), ("--peers", "1")),
    "two-peers": ((Kill(50, (1,)),), ("--peers", "2")),
    "three-peers": ((Kill(50, (0,)),), ("--peers", "3")),
    "cold-starts": ((Kill(50, (0,)),), ("--start", "cold")),
    "warm-starts": ((Kill(50, (0,)),), ("--start", "warm")),
    "delivered-twice": ((DeliverTwice(40, 2),), ()),
    **{f"kill-{number}": (random_kill(number), ()) for number in range(20)},
}
IN_EVERY_TEST_RUN = {("all-but-one", "ring"), ("pause-1", "ring")}


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
    scenario: str, collective: str, run: Play, reference: Reference
) -> None:
    """Whatever happens to the peers, not one bit of the result changes."""
    faults, options = SCENARIOS[scenario]
    work = digits(collective, STEPS_OF_COLD_STARTS if scenario == "cold-starts" else STEPS)
    result = run(work, scenario, *faults, options=options)
    assert result.weights == reference(work).weights
    assert result.summary["steps"] == work.steps
    assert result.summary["metrics"]["accuracy"] >= 0.95


@pytest.mark.acceptance
@pytest.mark.parametrize("links", ["relay", "direct"])
def test_the_way_of_the_bytes_does_not_matter(links: str, run: Play, reference: Reference) -> None:
    """Through relays, over TCP, or within the host, also when a peer is killed: the same bits."""
    work = digits("ring")
    result = run(work, f"links-{links}", Kill(100, (2,)), options=("--links", links))
    assert result.weights == reference(work).weights
    counted = {"auto": reference(work).summary["traffic"], links: result.summary["traffic"]}
    for each, traffic in counted.items():
        assert traffic["malformed"] == traffic["gone"] == 0
        assert traffic["relayed_bytes"] > 0
        assert (traffic["direct_bytes"] > traffic["relayed_bytes"]) == (each != "relay")


@pytest.mark.acceptance
def test_the_order_of_additions_is_seen_in_the_last_bits(reference: Reference) -> None:
    """Ring and direct have the same order, butterfly another."""
    assert reference(digits("ring")).weights == reference(digits("direct")).weights
    assert reference(digits("ring")).weights != reference(digits("butterfly")).weights


WIDE = Workload(JOB.parents[1] / "benchmarks" / "wide_job.py", 24, "ring", shards=2)
"""Vectors of 16 MB, which are named and not sent, and of which parts are handed out early."""


def test_neither_overlap_nor_names_are_seen_in_the_bits(run: Play) -> None:
    """Whole vectors through a relay, or parts where they lie while the rest is computed."""
    peers = ("--peers", "2")
    plain = run(WIDE, "plain", options=(*peers, "--no-overlap", "--links", "relay"))
    quick = run(WIDE, "quick", Kill(8, (1,)), options=peers)
    assert plain.weights == quick.weights
    assert plain.summary["traffic"]["named"] == 0
    named, gone = (quick.summary["traffic"][name] for name in ("named_bytes", "gone"))
    assert named > 100_000_000 and gone <= 20


def test_within_a_host_beats_go_past_the_relays(run: Play) -> None:
    """Also to whom no segment goes, which in a ring is all but one; these segments are named."""
    wide = workload_of("wide", 100, "ring")
    traffic = run(wide, "beats").summary["traffic"]
    assert traffic["relayed"] < traffic["direct"]
