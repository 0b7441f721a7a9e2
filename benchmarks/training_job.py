"""The three tasks of `benchmarks.training`, without evaluation: `subject` says which.

`digits` and `charlm` are the examples. `cnn` is a convolutional network of ResNet-18's size (11.7
million parameters) on synthetic images that are so small that the exchange of gradients takes as
long as to compute them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from p2p import Task
from p2p.job import load_task

EXAMPLES = Path(__file__).parents[1] / "examples"


def cnn(steps: int) -> Task:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(1024, 3, 16, 16, generator=draw)
    labels = torch.randint(10, (1024,), generator=draw)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in (
        *((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)),
        *((512, 512, 1), (512, 512, 1), (512, 512, 1), (512, 512, 1), (512, 182, 1)),
    ):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return Task(
        model=nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(182, 10)),
        dataset=torch.utils.data.TensorDataset(images, labels),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        batch_size=64,
        steps=steps,
    )


def task(subject: str = "cnn", steps: int = 200) -> Task:
    if subject == "cnn":
        return cnn(steps)
    whole = load_task(EXAMPLES / f"{subject}.py", {"steps": str(steps)})
    return replace(whole, evaluate=None)
