"""Finished steps per second under hand-overs and kills, as a share of an undisturbed run.

    python -m benchmarks.goodput --json

examples/charlm.py on four peers, with snapshot starts: its steps take long enough to be those of a
real job, and short enough to count many. Each measurement lasts `--seconds` from a run's first
steps on; undisturbed and disturbed ones alternate, for `--rounds` rounds.

`handovers`: `--time-limit 40`, so that with four peers there is one every 10 s or sooner.
`kills`: a random peer is SIGKILLed every 15 s; beside it torchrun's share under the same kills. The
share is that of new steps: what is computed again since a checkpoint does not count.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import finish, middle, say, surroundings
from benchmarks.subjects import Ours, Subject, Torchrun, Work

CHARLM = Work(Path(__file__).parents[1] / "examples" / "charlm.py", {})
LIFE_S = "40"
KILL_EVERY_S = 15.0


def rate(subject: Subject, seconds: float, draw: random.Random | None = None) -> dict[str, Any]:
    """New steps per second; with `draw`, somebody is killed every 15 s."""
    began = subject.steps()[-1]
    until, kill_at, killed = time.time() + seconds, time.time() + KILL_EVERY_S / 2, 0
    while time.time() < until:
        time.sleep(0.05)
        if draw is not None and time.time() >= kill_at:
            subject.kill_one(draw)
            kill_at, killed = kill_at + KILL_EVERY_S, killed + 1
    ended = time.time()
    newest = max(step for at, step in subject.steps() if at <= ended)
    return {
        "steps_per_s": round((newest - began[1]) / (ended - began[0]), 3),
        "kills": killed,
    }


def round_of(home: Path, number: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with Ours(CHARLM, home, f"calm-{number}") as run:
        found["calm"] = rate(run, seconds)
    with Ours(CHARLM, home, f"handovers-{number}", "--time-limit", LIFE_S) as run:
        found["handovers"] = rate(run, seconds)
        found["handovers"]["handovers"] = run.live.handovers()
    with Ours(CHARLM, home, f"kills-{number}") as run:
        found["kills"] = rate(run, seconds, draw)
    with Torchrun(CHARLM, home / f"torchrun-calm-{number}") as theirs:
        found["torchrun_calm"] = rate(theirs, seconds)
    with Torchrun(CHARLM, home / f"torchrun-kills-{number}") as theirs:
        found["torchrun_kills"] = rate(theirs, seconds, draw)
    for name, calm in (
        ("handovers", "calm"),
        ("kills", "calm"),
        ("torchrun_kills", "torchrun_calm"),
    ):
        found[name]["share"] = round(found[name]["steps_per_s"] / found[calm]["steps_per_s"], 3)
    say(f"round {number}: {found}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: dict[str, Any] = surroundings()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        rounds = [
            round_of(Path(folder), number, options.seconds, draw)
            for number in range(options.rounds)
        ]
    for name in ("handovers", "kills", "torchrun_kills"):
        found[f"{name}_share"] = middle([each[name]["share"] for each in rounds])
    finish({**found, "rounds": rounds}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
