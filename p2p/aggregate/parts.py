"""What peers and workers build alike: the task, its state, and what a part of the samples adds.

A run with V shards and W workers cuts the samples into V·W parts; part v·W + w is worker w's of
shard v. To `plan.py` and `algorithm.py` these parts are shards like any others, each seeded by its
number, and shard v's contribution is the sum over its parts, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2p.algorithm import GradientAveraging
from p2p.job import load_task
from p2p.plan import Plan
from p2p.spec import RunSpec
from p2p.state import TrainingState
from p2p.task import Task

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Built:
    """One process's own copy of everything."""

    task: Task
    state: TrainingState
    algorithm: GradientAveraging

    def memory(self) -> tuple[npt.NDArray[np.float32], Bytes]:
        """The model's memory: the trainable parameters with the gaps between them, and the rest."""
        memory = self.state.flat.memory
        end = 4 * self.algorithm.gradient_length
        parameters: Any = memory[:end].view(np.float32)
        return parameters, memory[end:]


def build(spec: RunSpec) -> Built:
    """Raises all that `load_task` raises, and InvalidTask."""
    task = load_task(Path(spec.job), dict(spec.settings))
    plan = Plan(
        len(task.dataset),
        spec.parts,
        task.batch_size,
        steps=spec.steps,
        accumulate=task.accumulate,
        seed=task.seed,
    )
    state = TrainingState(task)
    return Built(task, state, GradientAveraging(task, state, plan))
