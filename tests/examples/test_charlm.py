"""The second example learns to tell the next byte."""

from __future__ import annotations

from pathlib import Path

from p2p.algorithm import GradientAveraging
from p2p.job import load_task
from p2p.plan import Plan
from p2p.seeding import configure_determinism
from p2p.state import TrainingState

JOB = Path(__file__).parents[2] / "examples" / "charlm.py"


def test_charlm_learns() -> None:
    """In a fifth of its steps it needs half a bit less than the frequencies of the bytes give."""
    configure_determinism(1)
    task = load_task(JOB, {"steps": "60"})
    plan = Plan(len(task.dataset), 4, task.batch_size, steps=task.steps, seed=task.seed)
    state = TrainingState(task)
    algorithm = GradientAveraging(task, state, plan)
    for _ in range(plan.steps):
        mean = algorithm.contribution(0, lambda: None)
        for shard in range(1, 4):
            mean += algorithm.contribution(shard, lambda: None)
        algorithm.apply(mean)
    unigram_bits = 4.47
    assert state.evaluate(task)["bits_per_byte"] <= unigram_bits - 0.5


def test_charlm_takes_settings_and_overlapping_windows() -> None:
    """`--set` reaches what one would like to change; a target is its input, one byte later."""
    settings = {"steps": "30", "seed": "4", "width": "32", "depth": "1", "context": "16"}
    task = load_task(JOB, settings)
    assert (task.steps, task.seed) == (30, 4)
    first, last = task.dataset[0], task.dataset[len(task.dataset) - 1]
    assert [part.shape for part in (*first, *last)] == [(16,)] * 4
    assert first[0][1:].tolist() == first[1][:-1].tolist()
    assert first[0][8:].tolist() == task.dataset[1][0][:8].tolist()
