"""Whether a job can be run at all, found out in a process of its own before the run begins.

That is a function, started from the snapshot that the peers are started from, if there is one and
it finds nothing wrong. Otherwise, `inquiry.ask("launcher.preflight", …)` has a fresh process look,
and say what is wrong. The answer is what the launcher needs to know of the task.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.inquiry import JobRequest, answer, blamed_on
from launcher.preload import imports_of
from p2p.importing import uncollected

if TYPE_CHECKING:
    from p2p.algorithm import Algorithm
    from p2p.plan import Plan
    from p2p.task import Task


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
    """What importing torch, Mayfly and the modules that the job names took; not from a snapshot."""
    build_s: float
    """What building the task and probing it took."""
    step_s: float
    """What a shard's contribution and applying a mean took."""
    gradients_come_once: bool
    """So that they can be summed before the backward pass is at its end."""


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
    began = _own_time()
    job = Path(request.job)
    with uncollected():
        from p2p.algorithm import GradientAveraging
        from p2p.spec import job_digest
        from p2p.state import TrainingState

        digest = job_digest(job)
        for name in ("torch._dynamo", *imports_of(job)):  # the first is any optimizer's
            with suppress(Exception):  # running the job will tell
                import_module(name)
    imported = _own_time()
    task, plan = load(request)
    with blamed_on(job, "its first batch was computed"):
        state = TrainingState(task)
        built = _own_time()
        algorithm = GradientAveraging(task, state, plan)
        if request.aggregate == "database":
            from p2p.aggregate.parts import Built
            from p2p.aggregate.stored_optimizer import StoredOptimizer

            StoredOptimizer(Built(task, state, algorithm))
        gradients_come_once = algorithm.rehearse(lambda: None)
    first_s, step_s = _time_of_a_step(algorithm), _time_of_a_step(algorithm)
    found = Findings(
        plan.steps,
        plan.samples,
        task.seed,
        digest,
        plan.steps_per_epoch if task.evaluate is not None else 0,
        # torch imports a part of itself with the first step of an optimizer
        import_s=imported - began + max(0.0, first_s - step_s),
        build_s=built - imported + step_s,
        step_s=step_s,
        gradients_come_once=gradients_come_once,
    )
    return asdict(found)


def _own_time() -> float:
    """Seconds, less those in which this process waited for a processor that others had."""
    try:
        waited_ns = int(Path("/proc/self/schedstat").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux, or a kernel that does not count it
        waited_ns = 0
    return time.monotonic() - waited_ns / 1e9


def _time_of_a_step(algorithm: Algorithm) -> float:
    """Of one peer when all are there; of the largest shard, with its share of the summing left out.

    0 when the optimizer raises: the run will say so, with the step.
    """
    began = _own_time()
    with suppress(Exception):
        algorithm.apply(algorithm.contribution(0, lambda: None))
        return _own_time() - began
    return 0.0


if __name__ == "__main__":
    sys.exit(answer(inspect))
