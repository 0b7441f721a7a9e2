"""Whether a job can be run at all, found out in a process of its own before anything is started.

The answer to `inquiry.ask("launcher.preflight", …)` is what the launcher needs to know of the task.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.inquiry import JobRequest, answer, blamed_on

if TYPE_CHECKING:
    from p2p.plan import Plan
    from p2p.task import Task


@dataclass(frozen=True, slots=True)
class Findings:
    """What the launcher must know of a job to create a run."""

    steps: int
    samples: int
    seed: int
    job_digest: str


def load(request: JobRequest) -> tuple[Task, Plan]:
    """The task, and its plan for that many shards; this process is set up to compute it."""
    from p2p.job import load_task
    from p2p.plan import Plan
    from p2p.seeding import configure_determinism

    configure_determinism(request.threads)
    task = load_task(Path(request.job), request.settings)
    plan = Plan(
        len(task.dataset),
        request.shards,
        task.batch_size,
        epochs=task.epochs,
        steps=task.steps,
        accumulate=task.accumulate,
        seed=task.seed,
    )
    return task, plan


def inspect(request: JobRequest) -> dict[str, Any]:
    """Loads the job and computes a little of it. Raises what is wrong with it."""
    from p2p.algorithm import GradientAveraging
    from p2p.job import job_digest
    from p2p.state import TrainingState

    job = Path(request.job)
    digest = job_digest(job)
    task, plan = load(request)
    with blamed_on(job, "its first batch was computed"):
        state = TrainingState(task)
        GradientAveraging(task, state, plan).rehearse(lambda: None)
    return asdict(Findings(plan.steps, plan.samples, task.seed, digest))


if __name__ == "__main__":
    sys.exit(answer(inspect))
