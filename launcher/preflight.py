"""Whether a job can be run at all, found out in a process of its own before anything is started.

    python -m launcher.preflight FILE    with {"job", "shards", "settings", "threads"} as JSON in it

prints one JSON object: what the launcher needs to know of the task, or the error. In its own
process, because it runs the user's code and imports torch, which the launcher does without.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fault import errors
from fault.errors import InvalidTask, MayflyError, TaskRaised
from launcher.preload import imports_of

if TYPE_CHECKING:
    from p2p.algorithm import Algorithm


@dataclass(frozen=True, slots=True)
class Findings:
    """What the launcher must know of a job to create a run."""

    steps: int
    samples: int
    seed: int
    job_digest: str
    evaluate_every: int
    """Steps of an epoch, if the task evaluates."""
    import_s: float
    """What importing torch, Mayfly and the modules that the job names took."""
    build_s: float
    """What building the task and probing it took."""
    step_s: float
    """What a shard's contribution and applying a mean took."""


def inspect(job: Path, shards: int, settings: Mapping[str, str], threads: int) -> Findings:
    """Loads the job and computes a little of it. Raises what is wrong with it."""
    began = time.monotonic()
    from p2p.algorithm import GradientAveraging
    from p2p.job import load_task, user_trace
    from p2p.plan import Plan
    from p2p.seeding import configure_determinism
    from p2p.spec import job_digest
    from p2p.state import TrainingState

    digest = job_digest(job)
    configure_determinism(threads)
    for name in imports_of(job):
        with suppress(Exception):  # running the job will tell
            import_module(name)
    imported = time.monotonic()
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
        built = time.monotonic()
        algorithm = GradientAveraging(task, state, plan)
        algorithm.rehearse(lambda: None)
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
    first_s, step_s = _time_of_a_step(algorithm), _time_of_a_step(algorithm)
    return Findings(
        plan.steps,
        plan.samples,
        task.seed,
        digest,
        plan.steps_per_epoch if task.evaluate is not None else 0,
        # torch imports a part of itself with the first step of an optimizer
        import_s=imported - began + max(0.0, first_s - step_s),
        build_s=built - imported + step_s,
        step_s=step_s,
    )


def _time_of_a_step(algorithm: Algorithm) -> float:
    """Of one peer when all are there; of the largest shard, with its share of the summing left out.

    0 when the optimizer raises: the run will say so, with the step.
    """
    began = time.monotonic()
    with suppress(Exception):
        algorithm.apply(algorithm.contribution(0, lambda: None))
        return time.monotonic() - began
    return 0.0


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
