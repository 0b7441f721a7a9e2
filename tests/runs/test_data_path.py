"""However the bytes go, and whatever they are rounded to: each setting has one result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.live import Kill, KillPart, Result
from p2p.spec import COLLECTIVES, COMPRESSIONS
from tests.workloads import workload_of

STEPS = {"digits": 250, "charlm": 160, "wide": 200}
LIFE_S = "8"
"""Less, and two tests at once on two cores do little else than hand over."""
Play = Callable[..., Result]
Reference = Callable[[str, str, str], Result]


@pytest.fixture(scope="session")
def calm(run: Play) -> Reference:
    """The run of a setting in which nothing fails; through relays only, and with overlap."""
    known: dict[tuple[str, str, str], Result] = {}

    def look_up(job: str, collective: str, compress: str) -> Result:
        setting = job, collective, compress
        if setting not in known:
            work = workload_of(job, STEPS[job], collective)
            options = ("--compress", compress, "--links", "relay")
            known[setting] = run(work, f"calm-{compress}", options=options)
            assert known[setting].summary["deaths"] == 0
        return known[setting]

    return look_up


@pytest.mark.acceptance
@pytest.mark.timeout(400)
@pytest.mark.parametrize("overlap", ["overlap", "no-overlap"])
@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("job", list(STEPS))
def test_faults_change_not_one_bit(
    job: str, collective: str, compress: str, overlap: str, run: Play, calm: Reference
) -> None:
    """Two kills, hand-overs, and a relay of two that dies; overlap or not, the digest is one."""
    steps = STEPS[job]
    work = workload_of(job, steps, collective)
    faults = (
        Kill(steps // 10, (1,)),
        KillPart(steps // 4, ("relay-0",)),
        Kill(steps // 2, (0, 2)),
    )
    options = ("--compress", compress, f"--{overlap}", "--relays", "2")
    options += ("--time-limit", LIFE_S)
    result = run(work, f"{compress}-{overlap}", *faults, options=options)
    assert result.weights == calm(job, collective, compress).weights
    assert result.summary["deaths"] >= 2 and result.summary["handovers"] >= 1
    assert result.summary["steps"] == steps


@pytest.mark.timeout(400)
@pytest.mark.parametrize("links", ["direct", pytest.param("relay", marks=pytest.mark.acceptance)])
@pytest.mark.parametrize(
    ("job", "collective", "compress"),
    [
        ("digits", "direct", "int8"),
        # its segments are long enough for connections beside ZeroMQ
        pytest.param("wide", "ring", "none", marks=pytest.mark.acceptance),
    ],
)
def test_the_way_of_the_bytes_does_not_show(
    job: str,
    collective: str,
    compress: str,
    links: str,
    run: Play,
    calm: Reference,
    relay_address: str,
) -> None:
    """Over TCP with keys, or through relays on TCP: the same bits, and whoever hands over ends."""
    work = workload_of(job, STEPS[job], collective)
    options = ("--compress", compress, "--links", links, "--relay-listen", relay_address)
    options += ("--time-limit", LIFE_S, "--relays", "2")
    faults = Kill(30, (1,)), KillPart(60, ("relay-1",))
    result = run(work, f"{compress}-{links}", *faults, options=options)
    assert result.weights == calm(job, collective, compress).weights
    assert result.summary["handovers"] >= 1 and result.summary["deaths"] >= 1
    logs = (Path(result.summary["folder"]) / "logs" / "functions").glob("*.log")
    assert not [log for log in logs if "timed out" in log.read_text()]


@pytest.mark.acceptance
def test_compression_changes_the_result_and_says_how_much_it_saves(calm: Reference) -> None:
    """Otherwise the other tests of it would prove nothing."""
    plain, packed = (calm("digits", "direct", compress) for compress in ("none", "int8"))
    assert packed.weights != plain.weights
    sent = [each.summary["traffic"]["relayed_bytes"] for each in (plain, packed)]
    assert 0.2 < sent[1] / sent[0] < 0.35
    assert packed.summary["metrics"]["accuracy"] >= 0.95
