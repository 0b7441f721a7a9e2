"""The benchmarks run to their end, in their smallest form, and say what they promise to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shaped import why_not

ROOT = Path(__file__).parents[2]


def figures(module: str, *options: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", module, "--json", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["commit"] and found["cores"] and found["torch"]
    return found


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_recovery() -> None:
    """A kill of ours and one of torchrun's, and hand-overs of a small and a large state."""
    found = figures("benchmarks.recovery", "--tries", "2", "--handovers", "1")
    assert found["mayfly"]["recovery_s"] > 0 and found["mayfly"]["steps_lost"] == 0
    assert len(found["torchrun"]["tries"]) >= 2 and found["weights"]["same"]
    assert {name: each["deaths"] for name, each in found["handover"].items()} == {
        "digits": 0,
        "47MB": 0,
    }
    assert all(each["handovers"] >= 1 for each in found["handover"].values())


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_goodput() -> None:
    """A share for each kind of disturbance."""
    found = figures("benchmarks.goodput", "--rounds", "1", "--seconds", "10")
    for name in ("handovers", "kills", "torchrun_kills"):
        assert found[f"{name}_share"] > 0


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_database() -> None:
    """Steps inside and outside of a store, near and behind a slow link, and what a log costs."""
    found = figures("benchmarks.database", "--tries", "1", "--shaped-tries", "1")
    assert 0 < found["loopback"]["ResNet-18"]["less"] < 1
    assert found["persistence"]["times"] > 0 and found["bulk"]["of_client"] > 0
    if "skipped" not in found["shaped"]:
        behind = [each["less"] for each in found["shaped"].values() if isinstance(each, dict)]
        assert len(behind) == 3 and min(behind) > 0.5


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_robust() -> None:
    """Every rule with a wrong peer, and the mean without one."""
    found = figures("benchmarks.robust", "--steps", "24")
    assert [run["sabotaged"] for run in found["runs"]] == [False] + [True] * 6
    assert all(0 <= run["accuracy"] <= 1 for run in found["runs"])


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_collectives() -> None:
    """Each way of the bytes, beside Gloo and beside what the machine can do."""
    found = figures(
        *("benchmarks.collectives", "--processes", "2", "4", "--sizes", "4KB", "4MB"),
        *("--samples", "2"),
    )
    assert all(rate > 0 for rate in found["gb_per_s"].values())
    for size in ("N=2", "N=4"):
        for row in found[size].values():
            for way in ("host", "tcp", "relay"):
                assert row[f"{way}_speed"] > 0 and row[f"{way}_ms"] > row[f"{way}_floor_ms"] > 0


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_slow_links() -> None:
    """Each collective, and each compression, beside what a link carries."""
    found = figures("benchmarks.slow_links", "--samples", "1")
    if "skipped" not in found:
        for name in ("ring", "butterfly", "direct", "ring_bf16", "ring_int8", "ring_relay"):
            assert found[name]["of_link"] > 0 and found[name]["s"] > 0
            assert found[name]["again"] < 4 * 36, "more than everything once more"
        assert found["ring_int8"]["s"] < found["ring"]["s"]
        assert found["congestion"] == "cubic"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_slow_links_with_a_congestion_control_that_is_none() -> None:
    command = [sys.executable, "-m", "benchmarks.slow_links", "--congestion", "none at all"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "none at all is none of what is loaded here" in ended.stderr


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_compression() -> None:
    """Bytes and loss of an example, for each setting."""
    found = figures("benchmarks.compression", "--examples", "digits", "--steps", "60")
    shares = [found["digits"][compress]["share"] for compress in ("none", "bf16", "int8")]
    assert shares[0] == 1 and 0.45 < shares[1] < 0.6 and 0.2 < shares[2] < 0.35


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_training() -> None:
    """Samples per second of both."""
    found = figures(
        "benchmarks.training", "--rounds", "1", "--seconds", "5", "--subjects", "digits", "cnn"
    )
    for subject in ("digits", "cnn"):
        assert found[subject]["mayfly_samples_per_s"] > 0 and found[subject]["times"] > 0
