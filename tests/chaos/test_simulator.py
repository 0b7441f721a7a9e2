"""The simulator itself: faults do no harm, a seed replays to the letter, a defect is found."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from chaos.__main__ import main
from chaos.campaign import minimise, play
from chaos.faults import KINDS, Fault, Schedule, draw_schedule
from fault.membership import Membership
from p2p.collectives.executor import Executor
from p2p.collectives.memory import Vector

SEEDS_PER_TEST = 50


@pytest.mark.parametrize("start", range(0, 400, SEEDS_PER_TEST))
def test_random_faults_break_nothing(start: int) -> None:
    """Every invariant holds in a sample of the seeds that `make acceptance` plays."""
    broken = {
        seed: wrong
        for seed in range(start, start + SEEDS_PER_TEST)
        if (wrong := play(draw_schedule(seed)))
    }
    assert not broken


def test_the_sample_has_every_kind_of_fault() -> None:
    """No kind of fault is left out of the seeds that are always played."""
    schedules = [draw_schedule(seed) for seed in range(400)]
    assert {fault.kind for each in schedules for fault in each.faults} == set(KINDS)
    assert {each.collective for each in schedules} == {"ring", "butterfly", "direct", "allgather"}
    assert {each.peers for each in schedules} >= {2, 3, 4, 5, 6, 8, 32}
    assert any(each.handover_margin_s > 0 for each in schedules)
    assert any(not each.handover_stagger for each in schedules)


@pytest.mark.parametrize("seed", [3, 17, 99])
def test_a_seed_replays_to_the_letter(seed: int) -> None:
    """Two runs of one seed tell the same story, line by line."""
    first: list[str] = []
    second: list[str] = []
    assert play(draw_schedule(seed), first) == play(draw_schedule(seed), second)
    assert first and first == second


@pytest.mark.parametrize("collective", ["ring", "butterfly", "direct"])
@pytest.mark.parametrize("survivor", range(4))
def test_all_but_one_may_die_at_once(collective: str, survivor: int) -> None:
    """Whoever is left carries the state on: the final digest is the faultless one."""
    others = tuple(slot for slot in range(4) if slot != survivor)
    crash = Fault("crash", 1.3, slots=others)
    planned = Schedule(survivor, 4, 4, 30, collective, 2, float("inf"), 0.0, (crash,))
    assert not play(planned)


@pytest.mark.parametrize("stagger", [0.0, 1.0])
@pytest.mark.parametrize("peers", [1, 2, 4])
def test_a_deadline_passes_without_anyone_noticing(peers: int, stagger: float) -> None:
    """Every peer hands over before its deadline: nobody leaves otherwise, nobody is missed."""
    trace: list[str] = []
    nothing: tuple[Fault, ...] = ()
    planned = Schedule(1, peers, 4, 150, "butterfly", 2, 6.0, 1.0, nothing, stagger)
    assert not play(planned, trace)
    handed_over = [line for line in trace if "handed over" in line]
    assert len(handed_over) >= peers
    assert not [line for line in trace if "out of time" in line or "time limit" in line]


@pytest.mark.parametrize("kind", ["crash-member", "crash-successor", "crash"])
@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_a_crash_in_any_phase_of_a_hand_over(kind: str, stagger: float) -> None:
    """The old peer, the successor or both die, at any moment from the invitation to the swap."""
    for number in range(40):
        crash = Fault(kind, 2.5 + 0.09 * number, slots=((number // 3) % 4,))
        planned = Schedule(number, 4, 4, 70, "ring", 2, 6.0, 0.5, (crash,), stagger)
        assert not play(planned)


def test_a_wrong_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is merciless: a sum in another order is another mean."""
    contribute = Executor.contribute

    def disturbed(executor: Executor, node: int, vector: Vector) -> None:
        contribute(executor, node, vector * np.float32(1.0000001))

    planned = draw_schedule(1)
    assert not play(planned)  # and the reference is known from here on
    monkeypatch.setattr(Executor, "contribute", disturbed)
    assert "another mean" in play(planned)


def test_minimising_leaves_only_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several faults, the one that brings the defect out remains."""
    monkeypatch.setattr(Membership, "_revive", lambda *_: None)
    everyone = Fault("crash", 1.3, slots=(0, 1, 2, 3))
    harmless = (Fault("slow", 1.0, 1.0, (1,), 3.0), Fault("double", 1.1, 1.0, amount=0.3))
    planned = Schedule(0, 4, 4, 10, "ring", 1, float("inf"), 0.0, (*harmless, everyone))
    assert minimise(planned) == replace(planned, faults=(everyone,))


def test_the_command_reports_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for programs, exit code 0 when all held."""
    assert main(["simulate", "--seeds", "20", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == 20 and report["failed"] == []
    assert report["runs_per_minute"] > 0


def test_the_command_prints_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """`--seed` tells one run: its faults, its views, who was born and who died."""
    seed = next(s for s in range(400) if draw_schedule(s).faults[0].at < 1.0)
    assert main(["simulate", "--seed", str(seed)]) == 0
    told = capsys.readouterr().out
    assert f"seed {seed}" in told and "FAULT" in told and "view 0" in told
    assert "every invariant held" in told
