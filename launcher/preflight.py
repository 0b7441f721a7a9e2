"""Whether a job can be run at all, found out in a process of its own before anything is started.

    python -m launcher.preflight FILE    with {"job", "shards", "settings", "threads"} as JSON in it

prints one JSON object: what the launcher needs to know of the task, or the error. In its own
process, because it runs the user's code and imports torch, which the launcher does without.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault import errors
from fault.errors import InvalidTask, MayflyError, TaskRaised


@dataclass(frozen=True, slots=True)
class Findings:
    """What the launcher must know of a job to create a run."""

    steps: int
    samples: int
    seed: int
    job_digest: str


def inspect(job: Path, shards: int, settings: Mapping[str, str], threads: int) -> Findings:
    """Loads the job and computes a little of it. Raises what is wrong with it."""
    from p2p.algorithm import GradientAveraging
    from p2p.job import job_digest, load_task, user_trace
    from p2p.plan import Plan
    from p2p.seeding import configure_determinism
    from p2p.state import TrainingState

    configure_determinism(threads)
    digest = job_digest(job)
    task = load_task(job, settings)
    plan = Plan(
        len(task.dataset),
        shards,
        task.batch_size,
        epochs=task.epochs,
        steps=task.steps,
        accumulate=task.accumulate,
        seed=task.seed,
    )
    try:
        state = TrainingState(task)
        GradientAveraging(task, state, plan).rehearse(lambda: None)
    except MayflyError:
        raise
    except Exception as error:
        trace = user_trace(error, job)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "  File " in trace:
            raise TaskRaised(
                f"{job.name} raised {reason} while its first batch was computed", trace
            ) from error
        raise InvalidTask(f"the first batch of {job.name} cannot be computed: {reason}") from error
    return Findings(plan.steps, plan.samples, task.seed, digest)


def report(error: MayflyError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "message": str(error),
        "trace": getattr(error, "trace", ""),
    }


def reported(found: Mapping[str, Any]) -> MayflyError:
    """The error again, in another process, that `report` told of."""
    kind: type[MayflyError] = getattr(errors, found["error"], MayflyError)
    return kind(*filter(None, (found["message"], found["trace"])))


def main() -> int:
    # what the job prints, from Python or not, now or at exit, is not the answer
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
        job, settings = Path(request["job"]), dict(request["settings"])
        try:
            answer = asdict(inspect(job, request["shards"], settings, request["threads"]))
        except MayflyError as error:
            answer = report(error)
        print(json.dumps(answer), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
