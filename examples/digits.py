"""Handwritten digits: a small convolutional network on scikit-learn's 1,797 images of 8 x 8 pixels.

    p2p-launch run examples/digits.py --peers 4 --kill 2@60

Every fifth image is held out and never trained on; `accuracy` is the share of these that the
trained network reads correctly.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from p2p import Task


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(2 * width * 2 * 2, 10),
    )


def task(
    steps: int = 120,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    width: int = 16,
    seed: int = 0,
) -> Task:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            right = model(images[held_out]).argmax(dim=1) == labels[held_out]
        return {"accuracy": right.double().mean().item()}

    return Task(
        model=network(width),
        dataset=TensorDataset(images[~held_out], labels[~held_out]),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=steps + 1
        ),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        evaluate=evaluate,
    )
