"""A small training whose gradients a store averages, in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fault.records import Timing
from p2p.aggregate.averaging import DatabaseAveraging
from p2p.aggregate.parts import Built
from p2p.algorithm import GradientAveraging
from p2p.plan import Plan
from p2p.spec import RunSpec
from p2p.state import TrainingState
from p2p.task import Task

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
}


def built(optimizer: str) -> Built:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(100, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 3))
    model[0].bias.requires_grad_(False)
    data = torch.utils.data.TensorDataset(torch.randn(8, 100), torch.zeros(8, 3))
    task = Task(model, data, nn.MSELoss(), OPTIMIZERS[optimizer], batch_size=8, steps=9)
    state = TrainingState(task)
    return Built(task, state, GradientAveraging(task, state, Plan(8, 2, 8, steps=9)))


def averaging(one: Built, slot: int, urls: list[str]) -> tuple[DatabaseAveraging, list[str]]:
    warnings: list[str] = []
    spec = RunSpec(
        *("r", "job.py", (), "", 0, 2, 2, 9, 8, "/", (), "", "file:///"),
        workers=1, stores=tuple(urls), prefix="r", aggregate="database", timing=Timing(),
    )  # fmt: skip
    return DatabaseAveraging(spec, slot, one, lambda worker: None, warnings.append), warnings


def mean_of(one: Built) -> npt.NDArray[np.float32]:
    total = sum(one.algorithm.contribution(shard, lambda: None) for shard in range(2))
    return np.asarray(total, np.float32)


def step(one: Built, averaging: DatabaseAveraging) -> None:
    averaging.apply(mean_of(one))
