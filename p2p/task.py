"""What the user hands in: the model, the data and how to train.

Not here: how a job file is found and run (`job.py`), and what becomes of a task (`state.py`,
`algorithm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fault.errors import InvalidTask

Parameters = list[nn.Parameter]


class MapDataset(Protocol):
    """A map-style dataset: `dataset[i]` is (input, target), for every i in range(len(dataset))."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Scheduler(Protocol):
    """What torch's learning-rate schedulers have in common; it is stepped once per step."""

    def step(self, *arguments: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One training task. Raises InvalidTask for values that cannot be trained with.

    A task belongs to one `TrainingState`, which moves the model's tensors into its own memory.
    The model trains in float32 on the CPU. A model in evaluation mode is put into training mode as
    a whole; otherwise each of its modules stays in the mode it is handed over in.
    """

    model: nn.Module
    dataset: MapDataset
    """Samples (input, target), batched as `torch.utils.data.default_collate` does."""
    loss: Callable[[Any, Any], Tensor]
    """loss(output, target): a scalar, the mean over the samples of the batch."""
    optimizer: Callable[[Parameters], torch.optim.Optimizer]
    batch_size: int
    """Samples per step over all shards; the last batch of an epoch may be smaller."""
    epochs: int | None = None
    steps: int | None = None
    """Either `epochs` or `steps` says how long to train."""
    accumulate: int = 1
    """Micro-batches in which a shard computes its part of a step; saves memory, not time."""
    scheduler: Callable[[Any], Scheduler] | None = None
    """Stepped once per step, not per epoch; ReduceLROnPlateau is given the step's loss."""
    seed: int = 0
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    """evaluate(model) of the trained model in evaluation mode: names to numbers, to be reported."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InvalidTask(f"model is {_kind(self.model)}, not a torch.nn.Module")
        dataset: object = self.dataset
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__len__")
            or not hasattr(dataset, "__getitem__")
        ):
            raise InvalidTask(
                f"dataset is {_kind(dataset)}, not a map-style dataset: it needs __len__ and "
                "__getitem__, because a shard's samples must be the same whoever computes it"
            )
        required = (("loss", self.loss), ("optimizer", self.optimizer))
        optional = (("scheduler", self.scheduler), ("evaluate", self.evaluate))
        for name, value in (*required, *(each for each in optional if each[1] is not None)):
            if not callable(value):
                raise InvalidTask(f"{name} is {_kind(value)}, not a function")
        if (self.epochs is None) == (self.steps is None):
            raise InvalidTask("give either epochs or steps, and not both")
        for name in ("batch_size", "epochs", "steps", "accumulate"):
            number = getattr(self, name)
            optional_number = name in ("epochs", "steps") and number is None
            if not optional_number and (type(number) is not int or number < 1):
                raise InvalidTask(f"{name} is {number!r}, not a whole number from 1")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise InvalidTask(f"seed is {self.seed!r}, not a whole number from 0 to 2**63 - 1")


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
