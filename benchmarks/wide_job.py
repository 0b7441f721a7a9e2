"""A job with a large state: its parameters and AdamW's two moments are 47 MB together.

Synthetic data; what counts is how much there is to hand over, not what is learnt.
"""

from __future__ import annotations

import torch
from torch import nn

from p2p import Task


def task(steps: int = 200, width: int = 1138, batch_size: int = 128, seed: int = 0) -> Task:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(2048, width, generator=draw)
    labels = torch.randint(10, (2048,), generator=draw)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return Task(
        model=nn.Sequential(*layers, nn.Linear(width, 10)),
        dataset=torch.utils.data.TensorDataset(inputs, labels),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
    )
