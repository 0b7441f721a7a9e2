"""The second example learns, on the text of whatever machine it runs on."""

from __future__ import annotations

from pathlib import Path

from p2p.algorithm import GradientAveraging
from p2p.job import load_task
from p2p.plan import Plan
from p2p.seeding import configure_determinism
from p2p.state import TrainingState

JOB = Path(__file__).parents[2] / "examples" / "charlm.py"


def test_charlm_learns_to_write() -> None:
    """After a hundred steps it needs far fewer bits for a byte than the bytes' frequencies do."""
    configure_determinism(1)
    task = load_task(JOB, {"steps": "100", "batch_size": "16"})
    plan = Plan(len(task.dataset), 2, task.batch_size, steps=task.steps, seed=task.seed)
    state = TrainingState(task)
    algorithm = GradientAveraging(task, state, plan)
    algorithm.rehearse(lambda: None)
    for _ in range(plan.steps):
        mean = algorithm.contribution(0, lambda: None)
        mean += algorithm.contribution(1, lambda: None)
        algorithm.apply(mean)
    assert state.evaluate(task)["bits_per_byte"] < 4.2
