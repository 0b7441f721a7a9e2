"""The optimizers' scripts against torch.optim, and what becomes of their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fault.errors import InvalidTask
from p2p.aggregate.parts import Built
from p2p.aggregate.scripts import FOLDER, source
from p2p.aggregate.stored_optimizer import StoredOptimizer
from p2p.aggregate.storing import composed
from p2p.algorithm import GradientAveraging
from p2p.plan import Plan
from p2p.state import TrainingState
from p2p.task import Task

STEPS = 200
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2
    ),
    "sgd-maximize": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, betas=(0.8, 0.95)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-maximize": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, maximize=True),
}


def groups(model: nn.Module, make: Make) -> torch.optim.Optimizer:
    """Two groups with different rates, as models without decay on biases have."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return make([{"params": weights}, {"params": biases, "lr": 0.02, "weight_decay": 0.0}])


def built(make: Make) -> Built:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.BatchNorm1d(3))
    data = torch.utils.data.TensorDataset(torch.zeros(8, 5), torch.zeros(8, 3))
    task = Task(
        model=model,
        dataset=data,
        loss=nn.MSELoss(),
        optimizer=lambda _: groups(model, make),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.05, 0.02], total_steps=STEPS + 1, cycle_momentum=False
        ),
        batch_size=8,
        steps=STEPS,
    )
    state = TrainingState(task)
    return Built(task, state, GradientAveraging(task, state, Plan(8, 1, 8, steps=STEPS)))


def store_step(one: Built, optimizer: StoredOptimizer, gradient: Any, marks: Any) -> None:
    """What the store and then the process do in a step, without a store."""
    unit = torch.jit.CompilationUnit(source(optimizer.script))
    run = unit.find_function(optimizer.script)
    parameters, _ = one.memory()
    vectors = optimizer.vectors()
    inputs = [parameters, gradient, *vectors.values()]
    copies = [torch.from_numpy(each.copy()) for each in inputs]
    outputs = run([*copies], [], optimizer.arguments(marks))
    assert [each.numpy().tobytes() for each in copies] == [each.tobytes() for each in inputs]
    parameters[:] = outputs[0].numpy()
    made = dict(zip(vectors, [each.numpy() for each in outputs[1:]], strict=True))
    optimizer.take_over(made, marks)
    assert one.state.scheduler is not None
    one.state.scheduler.step()


def torch_step(one: Built, gradient: Any, marks: Any) -> None:
    for entry, mark in zip(one.state.flat.trainable, marks, strict=True):
        start = entry.start // 4
        flat = torch.from_numpy(gradient)
        view = flat[start : start + entry.tensor.numel()].view_as(entry.tensor)
        entry.tensor.grad = view.clone() if mark > 0 else None
    one.state.optimizer.step()
    assert one.state.scheduler is not None
    one.state.scheduler.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_agrees_with_torch_over_200_steps(name: str) -> None:
    """Two groups, a schedule, parameters without gradient now and then; 1e-6, state included."""
    ours, theirs = built(OPTIMIZERS[name]), built(OPTIMIZERS[name])
    optimizer = StoredOptimizer(ours)
    draw = np.random.default_rng(3)
    length = ours.algorithm.gradient_length
    gaps = np.ones(length, bool)
    for entry in ours.state.flat.trainable:
        gaps[entry.start // 4 : entry.start // 4 + entry.tensor.numel()] = False
    for step in range(STEPS):
        gradient = draw.standard_normal(length).astype(np.float32)
        gradient[gaps] = 0.0
        marks = (draw.random(len(ours.state.flat.trainable)) > 0.1).astype(np.float32)
        if step == 0:
            marks[0] = 0.0
        store_step(ours, optimizer, gradient, marks)
        torch_step(theirs, gradient, marks)
    mine, other = ours.memory()[0], theirs.memory()[0]
    np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
    assert not mine[gaps].any()
    for (ours_p, _, _, _), (theirs_p, _, _, _) in zip(
        optimizer._places, StoredOptimizer(theirs)._places, strict=True
    ):
        state, wanted = ours.state.optimizer.state[ours_p], theirs.state.optimizer.state[theirs_p]
        assert set(state) == set(wanted)
        for key, value in wanted.items():
            if value is not None:
                torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_is_the_same_either_way(name: str) -> None:
    """The state after steps by script can be written, and read by a process that goes on."""
    one, other = built(OPTIMIZERS[name]), built(OPTIMIZERS[name])
    optimizer = StoredOptimizer(one)
    gradient = np.full(one.algorithm.gradient_length, 0.25, np.float32)
    marks = np.ones(len(one.state.flat.trainable), np.float32)
    for _ in range(3):
        store_step(one, optimizer, gradient, marks)
        one.state.step += 1
    again = StoredOptimizer(other)
    other.state.load(one.state.image())
    assert other.state.digest() == one.state.digest()
    assert again.arguments(marks) == optimizer.arguments(marks)
    for name_, vector in optimizer.vectors().items():
        assert again.vectors()[name_].tobytes() == vector.tobytes()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "differentiable"),
    ],
)
def test_an_optimizer_without_a_script_is_refused(make: Make, words: str) -> None:
    """By name, before anything is started."""
    with pytest.raises(InvalidTask, match=words):
        StoredOptimizer(built(make))


@pytest.mark.parametrize("name", ["total", "mean"])
def test_sums_are_in_order(name: str) -> None:
    """Bit for bit those of a loop over the vectors, for lengths around the chunk's."""
    run = torch.jit.CompilationUnit(source(name)).find_function(name)
    draw = np.random.default_rng(5)
    for length in (1, 65535, 65536, 65537, 200_000):
        vectors = [draw.standard_normal(length).astype(np.float32) for _ in range(5)]
        wanted = vectors[0].copy()
        for vector in vectors[1:]:
            wanted += vector
        if name == "mean":
            wanted /= np.float32(5)
        found = run([torch.from_numpy(each) for each in vectors], [], [])
        assert found.numpy().tobytes() == wanted.tobytes()


def test_every_script_is_one_function_of_its_name() -> None:
    """What the store is told of a script holds for each file."""
    for file in FOLDER.glob("[a-z]*.py"):
        needs_rule = file.stem.startswith("robust_")
        unit = torch.jit.CompilationUnit(composed(file.stem, "meamed" if needs_rule else ""))
        assert unit.find_function(file.stem) is not None
