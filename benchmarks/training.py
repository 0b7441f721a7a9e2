"""Samples per second, end to end, beside DistributedDataParallel with Gloo.

    python -m benchmarks.training --json

Four processes of one thread each train the same model on the same batches' size, by
`p2p-launch run` and by `torchrun`, without faults; both write a checkpoint every 50 steps, and
neither evaluates. They run one after another for `--seconds` each, in `--rounds` rounds; a figure
is the median of the rounds, and `times` how many samples ours trains on while DDP does one.

`--huge-pages` has torchrun started with the setting of glibc that ours gives its functions.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.goodput import rate
from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from benchmarks.subjects import ENVIRONMENT, Ours, Torchrun, Work
from p2p.job import load_task
from p2p.transport.allocation import HUGE_PAGES

JOB = Path(__file__).with_name("training_job.py")
SUBJECTS = ("cnn", "charlm", "digits")


def samples_per_s(
    subject: str, home: Path, number: int, seconds: float, environment: Mapping[str, str]
) -> dict[str, float]:
    """`environment` is torchrun's."""
    work = Work(JOB, {"subject": subject})
    batch = load_task(JOB, {"subject": subject}).batch_size
    with Ours(work, home, f"{subject}-{number}") as ours:
        mayfly = rate(ours, seconds)["whole_steps_per_s"]
    with Torchrun(work, home / f"torchrun-{subject}-{number}", environment) as theirs:
        ddp = rate(theirs, seconds)["whole_steps_per_s"]
    return {"mayfly": batch * mayfly, "ddp": batch * ddp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--subjects", nargs="*", default=[*SUBJECTS], choices=SUBJECTS)
    parser.add_argument("--huge-pages", action="store_true", help="for torchrun as well")
    options = parser.parse_args()
    environment = {**ENVIRONMENT, **HUGE_PAGES} if options.huge_pages else ENVIRONMENT
    unwind_when_terminated()
    found: dict[str, Any] = {
        "benchmark": "training",
        **surroundings(),
        "torchrun_environment": environment,
    }
    with tempfile.TemporaryDirectory() as folder:
        for subject in options.subjects:
            rounds = [
                samples_per_s(subject, Path(folder), number, options.seconds, environment)
                for number in range(options.rounds)
            ]
            row = {
                f"{name}_samples_per_s": round(median(each[name] for each in rounds), 1)
                for name in ("mayfly", "ddp")
            }
            row["times"] = round(median(each["mayfly"] / each["ddp"] for each in rounds), 2)
            found[subject] = {**row, "rounds": rounds}
            say(f"{subject}: {found[subject]}")
    head = ["", "mayfly_samples_per_s", "ddp_samples_per_s", "times"]
    table(head, [[each, *[found[each][key] for key in head[1:]]] for each in options.subjects])
    finish(found, options.json)


if __name__ == "__main__":
    main()
