"""Finished steps per second under hand-overs and kills, as a share of an undisturbed run.

    python -m benchmarks.goodput --json

examples/charlm.py on four peers, with snapshot starts: its steps take long enough to be those of a
real job, and short enough to count many. Each measurement lasts `--seconds` from a run's first
steps on; undisturbed and disturbed ones alternate, for `--rounds` rounds.

`handovers`: `--time-limit 40`, so that with four peers there is one every 10 s or sooner.
`kills`: a random peer is SIGKILLed every 15 s; beside it torchrun's share under the same kills. The
share is that of new steps: what is computed again since a checkpoint does not count.

A pause of more than 30 s is a hang. Its time counts as any other, with no steps in it;
`share_without_hangs` leaves it out.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import finish, middle, say, surroundings, table, unwind_when_terminated
from benchmarks.subjects import Ours, Subject, Torchrun, Work

CHARLM = Work(Path(__file__).parents[1] / "examples" / "charlm.py", {})
LIFE_S = "40"
KILL_EVERY_S = 15.0
HANG_S = 30.0
TOLD_S = 1.5
"""Steps are told of somewhat later than they are finished, and later still by a new teller."""
DISTURBED = (("handovers", "calm"), ("kills", "calm"), ("torchrun_kills", "torchrun_calm"))
"""What is measured, and beside what."""


def pace(steps: list[tuple[float, int]], began: float, ended: float) -> dict[str, Any]:
    """New steps per second in a stretch of time. `steps` are (time, step) in order of time.

    `whole_steps_per_s` is that of the time until the last one, without what was begun and not done.
    """
    first = max((step for at, step in steps if at <= began), default=0)
    newest, moments = first, [began]
    for at, step in steps:
        if began < at <= ended and step > newest:
            newest, moments = step, [*moments, at]
    pauses = [later - earlier for earlier, later in itertools.pairwise([*moments, ended])]
    hung_s = sum(pause for pause in pauses if pause > HANG_S)
    done, seconds = newest - first, ended - began
    return {
        "steps": done,
        "seconds": round(seconds, 3),
        "steps_per_s": round(done / seconds, 3),
        "whole_steps_per_s": round(done / (moments[-1] - began), 3) if done else None,
        "longest_pause_s": round(max(pauses), 3),
        "hung_s": round(hung_s, 3),
        "steps_per_s_without_hangs": round(done / (seconds - hung_s), 3) if done else None,
    }


def rate(subject: Subject, seconds: float, draw: random.Random | None = None) -> dict[str, Any]:
    """The pace from the newest step on; with `draw`, somebody is killed every 15 s."""
    began = subject.steps()[-1][0]
    until, kill_at, kills = began + seconds, began + KILL_EVERY_S / 2, list[float]()
    while time.time() < until:
        time.sleep(0.05)
        if draw is not None and time.time() >= kill_at:
            kills.append(round(subject.kill_one(draw).at - began, 3))
            kill_at += KILL_EVERY_S
    time.sleep(TOLD_S)
    return {**pace(subject.steps(), began, until), "kills_at_s": kills}


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
    for name, calm in DISTURBED:
        for key, share in (
            ("steps_per_s", "share"),
            ("steps_per_s_without_hangs", "share_without_hangs"),
        ):
            disturbed, undisturbed = found[name][key], found[calm][key]
            both = disturbed is not None and undisturbed
            found[name][share] = round(disturbed / undisturbed, 3) if both else None
    say(f"round {number}: {found}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unwind_when_terminated()
    found: dict[str, Any] = surroundings()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        rounds = [
            round_of(Path(folder), number, options.seconds, draw)
            for number in range(options.rounds)
        ]
    for name, _ in DISTURBED:
        for share in ("share", "share_without_hangs"):
            shares = [each[name][share] for each in rounds if each[name][share] is not None]
            found[f"{name}_{share}"] = middle(shares)
    show(found, rounds)
    finish({**found, "rounds": rounds}, options.json)
    return 0


def show(found: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    keys = ("steps_per_s", "longest_pause_s", "hung_s", "share", "share_without_hangs")
    names = ("calm", "handovers", "kills", "torchrun_calm", "torchrun_kills")
    rows = [
        [number, name, *[round_[name].get(key) for key in keys]]
        for number, round_ in enumerate(rounds)
        for name in names
    ]
    rows += [
        [
            "all",
            name,
            None,
            None,
            None,
            found[f"{name}_share"],
            found[f"{name}_share_without_hangs"],
        ]
        for name, _ in DISTURBED
    ]
    table(("round", "", *keys), rows)


if __name__ == "__main__":
    sys.exit(main())
