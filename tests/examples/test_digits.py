"""The example of the README learns what it promises."""

from __future__ import annotations

from pathlib import Path

from p2p.algorithm import GradientAveraging
from p2p.job import load_task
from p2p.plan import Plan
from p2p.seeding import configure_determinism
from p2p.state import TrainingState

JOB = Path(__file__).parents[2] / "examples" / "digits.py"


def test_digits_reaches_its_accuracy() -> None:
    """With four shards and the settings as they are, held-out accuracy is 0.95 at least."""
    configure_determinism(1)
    task = load_task(JOB, {})
    plan = Plan(len(task.dataset), 4, task.batch_size, steps=task.steps, seed=task.seed)
    state = TrainingState(task)
    algorithm = GradientAveraging(task, state, plan)
    algorithm.rehearse(lambda: None)
    for _ in range(plan.steps):
        mean = algorithm.contribution(0, lambda: None)
        for shard in range(1, 4):
            mean += algorithm.contribution(shard, lambda: None)
        algorithm.apply(mean)
    assert state.evaluate(task)["accuracy"] >= 0.95


def test_digits_takes_settings() -> None:
    """`--set` reaches what one would like to change."""
    task = load_task(JOB, {"steps": "30", "seed": "4", "width": "8", "learning_rate": "0.005"})
    assert (task.steps, task.seed) == (30, 4)
