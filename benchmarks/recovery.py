"""From SIGKILL to the next finished step, beside torchrun's; and what a deadline costs.

    python -m benchmarks.recovery --json

One peer of four, drawn at random, is killed at a random moment while examples/digits.py is trained,
by Mayfly and by `torchrun --max-restarts`, in turns, with a checkpoint every 50 steps in both. For
each kill, out of the moments at which survivors finished steps:

`next_s`       until the next step that goes beyond the newest one before the kill
`recovery_s`   until the end of the longest pause between two steps that follows: a step whose parts
               were all sent when the peer died comes next, but is no recovery
`beyond_s`     until a step that cannot have been on its way at the kill: two beyond the newest
`steps_lost`   steps that had been finished, and were finished again after that pause

A try that has not come to `beyond_s` after a minute is counted as a hang and is in no median.
`times_sooner` is torchrun's `beyond_s` by ours.

`weights` compares the final weights of a run of its own with kills with those of one without.

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

from benchmarks.report import finish, middle, say, surroundings, table, unwind_when_terminated
from benchmarks.subjects import BEGIN_S, GLANCE_S, PEERS, Ours, Subject, Torchrun, Work
from chaos.live import Fault, Kill, Result, play

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = Work(EXAMPLES / "digits.py", {})
WIDE = Work(Path(__file__).with_name("wide_job.py"), {})
HANG_S = 60.0
SETTLED_S = 3.0
"""The longest pause must have been over for so long."""
TURNS = 2
LIFE_S = "15"
HANDOVERS = 12
COMPARED_STEPS = 600
KILLS_BEFORE_COMPARISON = 2


def judge(steps: list[tuple[float, int]], killed_at: float, now: float) -> dict[str, float] | None:
    """What one kill cost; None while it is not over. `steps` are (time, step) in order of time."""
    before = max((step for at, step in steps if at <= killed_at), default=0)
    after = [(at, step) for at, step in steps if at > killed_at]
    beyond = next((at for at, step in after if step > before + 1), None)
    if beyond is None or now - beyond < SETTLED_S:
        return None
    moments = [killed_at, *[at for at, _ in after]]
    pauses = [(later - earlier, later) for earlier, later in itertools.pairwise(moments)]
    recovered_at = max(pauses)[1]
    first = min(step for at, step in after if at == recovered_at)
    newest = max((step for at, step in steps if at < recovered_at), default=0)
    return {
        "next_s": round(next(at for at, step in after if step > before) - killed_at, 4),
        "recovery_s": round(recovered_at - killed_at, 4),
        "beyond_s": round(beyond - killed_at, 4),
        "steps_lost": max(0, newest - first + 1),
    }


def recover(subject: Subject, draw: random.Random) -> dict[str, Any]:
    """Waits until it is whole, kills one, and waits until it goes on."""
    whole_until = time.monotonic() + BEGIN_S
    while not subject.is_whole():
        if time.monotonic() > whole_until:
            return {"hang": True, "why": "it was not whole again"}
        time.sleep(GLANCE_S)
    time.sleep(1.0 + draw.random())
    killed = subject.kill_one(draw)
    until = time.time() + HANG_S
    while time.time() < until:
        time.sleep(0.25)
        # read first: what is told between the two is of the time before
        now, steps = time.time(), subject.steps(without=killed.teller)
        cost = judge(steps, killed.at, now)
        if cost is not None:
            return {**cost, "killed_at": killed.at}
    return {"hang": True, "why": "no new step", "killed_at": killed.at}


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
    mine, other = found["mayfly"]["beyond_s"], found["torchrun"]["beyond_s"]
    return {**found, "times_sooner": round(other / mine, 2) if mine and other else None}


def summed_up(tries: list[dict[str, Any]]) -> dict[str, Any]:
    good = [each for each in tries if "hang" not in each]
    measures = ("next_s", "recovery_s", "beyond_s", "steps_lost")
    return {
        **{measure: middle([each[measure] for each in good]) for measure in measures},
        "steps_lost_most": max((each["steps_lost"] for each in good), default=None),
        "hangs": len(tries) - len(good),
        "tries": tries,
    }


def compare_weights(home: Path, draw: random.Random) -> dict[str, Any]:
    """Two runs of the same steps, one of them with kills at random moments."""
    say("final weights, with kills and without")
    between = range(50, COMPARED_STEPS - 50)
    steps = sorted(draw.sample(between, KILLS_BEFORE_COMPARISON))
    faults: list[Fault] = [Kill(step, (draw.randrange(PEERS),)) for step in steps]
    options = ("--peers", str(PEERS), "--set", f"steps={COMPARED_STEPS}", "--start", "snapshot")
    results: dict[str, Result] = {
        name: play(DIGITS.job, home, f"weights-{name}", options, chosen)
        for name, chosen in (("faultless", []), ("killed", faults))
    }
    return {
        "same": results["killed"].weights == results["faultless"].weights,
        "deaths": {name: result.summary["deaths"] for name, result in results.items()},
        "fingerprints": {name: result.weights for name, result in results.items()},
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
        "reason": "" if stalls else "there was no hand-over",
        "deaths": summary["deaths"],
        "handovers": summary["handovers"],
        "stalls_ms": stalls,
    }


def show(found: dict[str, Any]) -> None:
    if "mayfly" in found:
        measures = ("next_s", "recovery_s", "beyond_s", "steps_lost", "steps_lost_most", "hangs")
        rows = [[name, *[found[name][key] for key in measures]] for name in ("mayfly", "torchrun")]
        table(("medians", *measures), rows)
        say(f"{found['times_sooner']} times sooner; same weights: {found['weights']['same']}")
    if "handover" in found:
        figures = ("stall_ms", "handovers", "deaths")
        rows = [[name, *[each[key] for key in figures]] for name, each in found["handover"].items()]
        table(("hand-overs", *figures), rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--tries", type=int, default=10, help="of each; 0: no kills")
    parser.add_argument("--handovers", type=int, default=HANDOVERS, help="of each job; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unwind_when_terminated()
    found: dict[str, Any] = surroundings()
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        home = Path(folder)
        if options.tries:
            found |= kills(home, options.tries, options.seed)
            found["weights"] = compare_weights(home, random.Random(options.seed))
        if options.handovers:
            found["handover"] = {
                name: hand_over(work, home, name, options.handovers)
                for name, work in (("digits", DIGITS), ("47MB", WIDE))
            }
    show(found)
    finish(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
