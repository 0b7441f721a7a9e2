"""From SIGKILL to the next finished step, beside torchrun's; and what a deadline costs.

    python -m benchmarks.recovery --json

One peer of four, drawn at random, is killed at a random moment while examples/digits.py is trained,
by Mayfly and by `torchrun --max-restarts`, in turns, with a checkpoint every 50 steps in both.

`recovery_s` is the time from the kill to the end of the longest pause between two finished steps
that follows: a step whose parts were all sent when the peer died does not count as recovered.
`beyond_s`, for torchrun, is the time until a step that was not finished before. A try of torchrun's
that has not come so far after a minute is counted as a hang and is in no median.
`steps_lost` are those that had to be computed again.

`handover` has the stalls at hand-overs before a time limit: the pause around each, less the usual
time from step to step, for digits and for a job with a state of 47 MB.
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

from benchmarks.report import finish, middle, say, surroundings
from benchmarks.subjects import GLANCE_S, Ours, Subject, Torchrun, Work

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = Work(EXAMPLES / "digits.py", {})
WIDE = Work(Path(__file__).with_name("wide_job.py"), {})
HANG_S = 60.0
SETTLED_S = 3.0
"""The longest pause must have been over for so long."""
TURNS = 2
LIFE_S = "15"
HANDOVERS = 12


def recover(subject: Subject, draw: random.Random) -> dict[str, Any]:
    """Kills one; waits until the run goes on, and for it to be whole again."""
    while not subject.is_whole():
        time.sleep(GLANCE_S)
    time.sleep(1.0 + draw.random())
    killed_at = subject.kill_one(draw)
    until = time.time() + HANG_S
    while time.time() < until:
        time.sleep(0.25)
        steps = subject.steps()
        before = max((step for at, step in steps if at <= killed_at), default=0)
        after = [(at, step) for at, step in steps if at > killed_at]
        beyond = next((at for at, step in after if step > before + 1), None)
        if beyond is None or time.time() - beyond < SETTLED_S:
            continue
        moments = [killed_at, *[at for at, _ in after]]
        pauses = [(later - earlier, later) for earlier, later in itertools.pairwise(moments)]
        recovered_at = max(pauses)[1]
        first = next(step for at, step in after if at >= recovered_at)
        newest = max(step for at, step in steps if at < recovered_at)
        return {
            "recovery_s": round(recovered_at - killed_at, 4),
            "beyond_s": round(beyond - killed_at, 4),
            "steps_lost": max(0, newest - first + 1),
        }
    return {"hang": True}


def tries_of(make: Any, tries: int, draw: random.Random) -> list[dict[str, Any]]:
    """So many kills that were recovered from; a run that hangs is given up for another one."""
    found: list[dict[str, Any]] = []
    good = 0
    while good < tries and len(found) < 3 * tries:
        with make() as subject:
            while good < tries:
                found.append(recover(subject, draw))
                say(f"  {type(subject).__name__}: {found[-1]}")
                if "hang" in found[-1]:
                    break
                good += 1
    return found


def kills(home: Path, tries: int, seed: int) -> dict[str, Any]:
    draw, numbers = random.Random(seed), itertools.count()
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for turn in range(TURNS):
        share = tries // TURNS + (turn < tries % TURNS)
        ours += tries_of(lambda: Ours(DIGITS, home, f"kills-{next(numbers)}"), share, draw)
        theirs += tries_of(
            lambda: Torchrun(DIGITS, home / f"torchrun-{next(numbers)}"), share, draw
        )
    found = {"mayfly": summed_up(ours), "torchrun": summed_up(theirs)}
    mine, other = found["mayfly"]["recovery_s"], found["torchrun"]["beyond_s"]
    return {**found, "times_sooner": round(other / mine, 2) if mine and other else None}


def summed_up(tries: list[dict[str, Any]]) -> dict[str, Any]:
    good = [each for each in tries if "hang" not in each]
    return {
        "recovery_s": middle([each["recovery_s"] for each in good]),
        "beyond_s": middle([each["beyond_s"] for each in good]),
        "steps_lost": middle([each["steps_lost"] for each in good]),
        "hangs": len(tries) - len(good),
        "tries": tries,
    }


def hand_over(work: Work, home: Path, name: str, count: int) -> dict[str, Any]:
    """The stalls at `count` hand-overs or more."""
    say(f"hand-overs of {work.job.name}")
    with Ours(work, home, f"handover-{name}", "--time-limit", LIFE_S) as run:
        until = time.monotonic() + 20.0 * count
        while time.monotonic() < until:
            time.sleep(1.0)
            if run.live.handovers() >= count:
                break
        time.sleep(1.0)
        summary = run.summary()
    stalls: list[float] = summary["stall_ms"]["handover"]  # type: ignore[index]
    return {
        "stall_ms": middle(stalls),
        "deaths": summary["deaths"],
        "handovers": summary["handovers"],
        "stalls_ms": stalls,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--handovers", type=int, default=HANDOVERS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: dict[str, Any] = surroundings()
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        home = Path(folder)
        if options.tries:
            found |= kills(home, options.tries, options.seed)
        if options.handovers:
            found["handover"] = {
                name: hand_over(work, home, name, options.handovers)
                for name, work in (("digits", DIGITS), ("47MB", WIDE))
            }
    finish(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
