"""The same training as plain PyTorch's, against loops that use nothing of ours but the seeding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset, default_collate

from p2p import Task
from p2p.algorithm import GradientAveraging
from p2p.plan import Plan
from p2p.seeding import configure_determinism, seeded
from p2p.state import TrainingState

SEED = 11
WORD = (1 << 64) - 1


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    configure_determinism(1)


# --- ours -----------------------------------------------------------------------------------


def train(task: Task, shards: int, steps: int) -> tuple[TrainingState, list[float]]:
    plan = Plan(
        len(task.dataset),
        shards,
        task.batch_size,
        steps=steps,
        accumulate=task.accumulate,
        seed=task.seed,
    )
    state = TrainingState(task)
    algorithm = GradientAveraging(task, state, plan)
    losses = []
    for _ in range(steps):
        mean = algorithm.contribution(0, lambda: None)
        for shard in range(1, shards):
            mean += algorithm.contribution(shard, lambda: None)
        losses.append(algorithm.loss(mean))
        algorithm.apply(mean)
    return state, losses


# --- plain ----------------------------------------------------------------------------------


def shard_indices(samples: int, shards: int, batch: int, step: int, shard: int) -> list[int]:
    """The formula at the top of `p2p/plan.py`, in plain Python."""
    epoch, within = divmod(step, -(-samples // batch))
    start = int.from_bytes(sha256(f"order,{SEED},{epoch},{shard}".encode()).digest()[:8], "little")

    def key(index: int) -> int:
        z = (start + (index + 1) * 0x9E3779B97F4A7C15) & WORD
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
        return z ^ (z >> 31)

    order = sorted(range(len(range(shard, samples, shards))), key=key)
    places = range(within * batch, min((within + 1) * batch, samples))
    return [shard + shards * order[p // shards] for p in places if p % shards == shard]


@dataclass
class Trained:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]


def ordinary_loop(task: Task, steps: int, shards: int = 1) -> Trained:
    """An ordinary loop over global batches; with more shards, over the shards' samples together."""
    model = task.model
    model.train()
    optimizer = task.optimizer(list(model.parameters()))
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    losses = []
    for step in range(steps):
        indices = [
            index
            for shard in range(shards)
            for index in shard_indices(len(task.dataset), shards, task.batch_size, step, shard)
        ]
        optimizer.zero_grad()
        total = 0.0
        with seeded(SEED, step, 0):
            for part in np.array_split(indices, task.accumulate):
                inputs, targets = default_collate([task.dataset[int(i)] for i in part])
                loss = task.loss(model(inputs), targets)
                if task.accumulate > 1:
                    loss = loss * (len(part) / len(indices))
                loss.backward()
                total += loss.item()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(total)
        elif scheduler is not None:
            scheduler.step()
        losses.append(total)
    return Trained(model, optimizer, losses)


def loop_over_shards(task: Task, steps: int, shards: int) -> Trained:
    """Every shard starts from the same buffers; gradients add up, float buffers are averaged."""
    model = task.model
    model.train()
    optimizer = task.optimizer(list(model.parameters()))
    losses = []
    for step in range(steps):
        batches = [
            shard_indices(len(task.dataset), shards, task.batch_size, step, shard)
            for shard in range(shards)
        ]
        samples = sum(len(batch) for batch in batches)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        averaged: dict[str, Tensor] = {}
        optimizer.zero_grad()
        total = 0.0
        for shard, batch in enumerate(batches):
            if not batch:
                continue
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            with seeded(SEED, step, shard):
                inputs, targets = default_collate([task.dataset[i] for i in batch])
                loss = task.loss(model(inputs), targets) * (len(batch) / samples)
                loss.backward()
            total += loss.item()
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    part = buffer * (len(batch) / samples)
                    averaged[name] = averaged[name] + part if name in averaged else part
        for name, buffer in model.named_buffers():
            buffer.copy_(averaged[name] if name in averaged else before[name] + 1)
        optimizer.step()
        losses.append(total)
    return Trained(model, optimizer, losses)


# --- tasks ----------------------------------------------------------------------------------


class Images:
    """Images with noise from torch's, NumPy's and Python's global generators."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = float(np.random.uniform(0.9, 1.1)) + 0.1 * torch.rand(())
        return self.images[index] * noise, self.labels[index]


def convolutions() -> nn.Module:
    # no bias before a normalization: its gradient is rounding noise around zero, which Adam
    # scales up, so loops that add in another order part ways in it
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * 16, 10),
    )


def perceptron() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 37), nn.Tanh(), nn.Linear(37, 10))


def a_task(model: nn.Module, **changes: Any) -> Task:
    defaults: dict[str, Any] = {
        "dataset": Images(70),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        "batch_size": 16,
        "steps": 1,
        "seed": SEED,
    }
    return Task(model=model, **{**defaults, **changes})


def assert_same_bits(state: TrainingState, plain: Trained) -> None:
    """Parameters, buffers, and what the optimizer holds, down to the sign of a zero."""
    ours = {**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}
    theirs = {**dict(plain.model.named_parameters()), **dict(plain.model.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert bits(ours[name]) == bits(theirs[name]), name
    mine, other = state.optimizer.state_dict(), plain.optimizer.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for number, values in mine["state"].items():
        for key, value in values.items():
            expected = other["state"][number][key]
            if isinstance(value, Tensor):
                assert bits(value) == bits(expected), (number, key)
            else:
                assert value == expected, (number, key)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


# --- one shard: the same bits ---------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_shard_has_the_bits_of_an_ordinary_loop(name: str) -> None:
    """With one shard and no accumulation the training is that of an ordinary loop, bit for bit:
    batch normalization, dropout, random augmentation, incomplete last batches included."""
    task = a_task(convolutions(), optimizer=OPTIMIZERS[name])
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=12)
    state, losses = train(task, shards=1, steps=12)
    assert losses == plain.losses
    assert_same_bits(state, plain)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=30),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_step_once_per_step(name: str) -> None:
    """A scheduler is stepped as in a loop that steps it after every batch."""
    task = a_task(perceptron(), scheduler=SCHEDULERS[name])
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=12)
    state, losses = train(task, shards=1, steps=12)
    assert losses == plain.losses
    assert_same_bits(state, plain)


def test_accumulation_has_the_bits_of_an_ordinary_loop_that_accumulates() -> None:
    """One shard with micro-batches is an ordinary loop that adds up gradients of scaled losses."""
    task = a_task(convolutions(), accumulate=3)
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=8)
    state, losses = train(task, shards=1, steps=8)
    assert losses == pytest.approx(plain.losses, abs=1e-6)
    assert_same_bits(state, plain)


def test_other_memory_formats_keep_their_bits() -> None:
    """A channels_last model keeps its strides in the flat buffer, and so its kernels and bits."""
    model = convolutions().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = a_task(model)
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=6)
    state, losses = train(task, shards=1, steps=6)
    assert losses == plain.losses
    assert_same_bits(state, plain)


def test_recurrent_layers_keep_their_bits() -> None:
    """An LSTM, whose weights are also in a list of its own, trains as in an ordinary loop."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.lstm = nn.LSTM(8, 13, num_layers=2, dropout=0.2, batch_first=True)
            self.head = nn.Linear(13, 10)

        def forward(self, images: Tensor) -> Tensor:
            output: Tensor = self.head(self.lstm(images.squeeze(1))[0][:, -1])
            return output

    task = a_task(Reader())
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=6)
    state, losses = train(task, shards=1, steps=6)
    assert losses == plain.losses
    assert_same_bits(state, plain)


# --- several shards -------------------------------------------------------------------------


def test_four_shards_equal_the_ordinary_loop_on_the_global_batch() -> None:
    """Four shards, no BatchNorm or dropout, Adam at 1e-3: losses equal to 1e-4 over 50 steps."""
    images = Images(203)
    task = a_task(perceptron(), dataset=TensorDataset(images.images, images.labels), batch_size=32)
    plain = ordinary_loop(replace(task, model=copy.deepcopy(task.model)), steps=50, shards=4)
    _, losses = train(task, shards=4, steps=50)
    assert losses == pytest.approx(plain.losses, abs=1e-4, rel=0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_batch_norm_and_dropout_equal_a_plain_loop_over_the_shards(name: str) -> None:
    """Four shards with BatchNorm and dropout equal a loop over the shards with averaged buffers,
    to 1e-6 over 10 steps: losses, parameters and buffers, incomplete last batches included."""
    task = a_task(convolutions(), optimizer=OPTIMIZERS[name])
    plain = loop_over_shards(replace(task, model=copy.deepcopy(task.model)), steps=10, shards=4)
    state, losses = train(task, shards=4, steps=10)
    assert losses == pytest.approx(plain.losses, abs=1e-6, rel=0)
    theirs = {**dict(plain.model.named_parameters()), **dict(plain.model.named_buffers())}
    for entry in state.flat.entries:
        torch.testing.assert_close(entry.tensor, theirs[entry.name], atol=1e-6, rtol=0)
