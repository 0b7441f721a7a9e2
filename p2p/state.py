"""The training state: everything that outlives a step, and nothing else.

It is the model's parameters and buffers in one flat buffer, the optimizer's state, the scheduler's
and the number of steps done. `image` and `load` are each other's inverse, bit for bit; `digest`
names the state's values.

Not here: how a step changes the state (`algorithm.py`), and how an image is stored or sent.
"""

from __future__ import annotations

import inspect
import struct
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

from fault.errors import InvalidTask
from p2p.flat import FlatModel
from p2p.image import (
    Branch,
    Part,
    TreeReader,
    TreeWriter,
    Unsupported,
    array,
    header,
    row,
    split,
)
from p2p.seeding import BEFORE_STEPS, NO_SHARD, seeded
from p2p.task import Scheduler, Task

_MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError),
    *(struct.error, RecursionError, AssertionError),
)


class TrainingState:
    """The state of one task before its first step. The task's model belongs to it from now on.

    Raises InvalidTask when the model, the optimizer or the scheduler hold what an image cannot.
    """

    def __init__(self, task: Task) -> None:
        self.model = task.model
        self.flat = FlatModel(task.model)
        self.step = 0
        self._branches: dict[Any, Branch] = {}
        """What the last image had besides the model's memory."""
        with seeded(task.seed, BEFORE_STEPS, NO_SHARD):
            self.optimizer = _optimizer(task, self.flat)
            self.scheduler = _scheduler(task, self.optimizer)
        self._layout: bytes = msgpack.packb(
            [
                [e.name, str(e.tensor.dtype), [*e.tensor.size()], [*e.tensor.stride()], e.start]
                for e in self.flat.entries
            ]
        )
        self.pieces()

    def image(self) -> memoryview:
        """A copy of the state as bytes, as `p2p/image.py` describes them; read-only."""
        parts = [np.frombuffer(part, dtype=np.uint8) for part in self.pieces()]
        # NumPy asks for huge pages, without which most of the time would go into page faults
        image = np.empty(sum(map(len, parts)), dtype=np.uint8)
        np.concatenate(parts, out=image)
        return image.data.toreadonly()

    def digest(self) -> str:
        """xxh3_128 of the image, 32 hexadecimal digits, without making the image."""
        hashed = xxh3_128()
        for part in self.pieces():
            hashed.update(part)
        return hashed.hexdigest()

    def load(self, image: bytes | bytearray | memoryview) -> None:
        """Becomes the state that the image was taken from.

        Raises ValueError when the image is damaged or was taken from another task; then the state
        is as before, unless the damage is one that only the optimizer or the scheduler can notice.
        """
        try:
            (step, layout, table, optimizer, scheduler), body = split(image)
            if layout != self._layout:
                raise ValueError("it is the state of another model")
            if type(step) is not int or step < 0:
                raise ValueError("the step is no number")
            size = len(self.flat.memory)
            if table[0] != ["uint8", [size], [1]] or len(body) < size:
                raise ValueError("the model's tensors are missing")
            reader = TreeReader(table[1:], body[size:])
            optimizer_state = reader.value(optimizer, self.optimizer.state_dict())
            scheduler_state = self._scheduler_state(reader, scheduler)
            self.optimizer.load_state_dict(optimizer_state)
            if self.scheduler is not None:
                self.scheduler.load_state_dict(scheduler_state)
        except _MALFORMED as error:
            raise ValueError(f"these bytes are no state of this task: {error}") from error
        self.flat.memory[:] = np.frombuffer(body[:size], dtype=np.uint8)
        self.step = step
        if self.digest() != digest_of(image):
            raise ValueError(
                "the optimizer or the scheduler, given its own state_dict(), is not what it was: "
                "its load_state_dict() loses something"
            )

    def named_tensors(self) -> dict[str, Tensor]:
        """Copies, named as in `model.state_dict()`; a tied tensor has one under each name."""
        return {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }

    def evaluate(self, task: Task) -> dict[str, float]:
        """What `task.evaluate` says of the model as it is now; empty without such a function.

        It gets the model in evaluation mode, with the generators seeded for this step, and leaves
        the state untouched. Raises InvalidTask when what it returns is no numbers by name, and
        whatever it raises.
        """
        if task.evaluate is None:
            return {}
        try:
            with self.flat.untouched(), seeded(task.seed, self.step, NO_SHARD), torch.no_grad():
                self.model.eval()
                metrics: object = task.evaluate(self.model)
        finally:
            self.flat.training_mode()
        try:
            return {str(name): float(value) for name, value in dict(metrics).items()}  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise InvalidTask(
                "evaluate(model) returned something other than a mapping of names to numbers"
            ) from None

    def pieces(self) -> list[Part]:
        """The image in pieces, which are views: its head, the model's memory, other tensors."""
        memory = self.flat.memory
        own = range(memory.ctypes.data, memory.ctypes.data + max(1, len(memory)))
        writer = TreeWriter(own, self._branches)
        owner = "optimizer"
        try:
            optimizer = writer.packed(owner, self.optimizer.state_dict())
            owner = "scheduler"
            own_dict = self.scheduler.state_dict() if self.scheduler else None
            scheduler = writer.packed(owner, own_dict)
        except Unsupported as error:
            error.path.append(owner)
            raise InvalidTask(f"the state of the {owner} cannot be kept: {error}") from None
        self._branches = writer.branches
        table = array([row("uint8", (len(memory),), (1,)), *writer.table])
        step, layout = msgpack.packb(self.step), msgpack.packb(self._layout)
        head = header(step, layout, table, optimizer, scheduler)
        return [head, memory.data, *writer.parts]

    def _scheduler_state(self, reader: TreeReader, tree: Any) -> dict[str, Any]:
        own = self.scheduler.state_dict() if self.scheduler else None
        value = reader.value(tree, own)
        if (own is None) != (value is None) or (own and own.keys() != value.keys()):
            raise ValueError("it is the state of another scheduler")
        return value or {}


def digest_of(image: bytes | bytearray | memoryview) -> str:
    """What `digest` says for the state that this image was taken from."""
    return xxh3_128_hexdigest(image)


def _optimizer(task: Task, flat: FlatModel) -> torch.optim.Optimizer:
    optimizer: object = task.optimizer(list(task.model.parameters()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidTask(
            f"optimizer(params) returned {type(optimizer).__name__}, not a torch.optim.Optimizer"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (
        closure is not None and closure.default is inspect.Parameter.empty
    ):
        raise InvalidTask(
            f"{type(optimizer).__name__} evaluates the loss several times within a step (it needs "
            "a closure), and a step here has one gradient; use an optimizer that needs none"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise InvalidTask("SparseAdam takes sparse gradients only; use Adam, gradients are dense")
    known = {id(entry.tensor) for entry in (*flat.trainable, *flat.frozen)}
    for number, group in enumerate(optimizer.param_groups):
        if any(id(parameter) not in known for parameter in group["params"]):
            raise InvalidTask(
                f"group {number} of the optimizer has a parameter that is not one of the model's"
            )
    return optimizer


def _scheduler(task: Task, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    if task.scheduler is None:
        return None
    scheduler = task.scheduler(optimizer)
    for method in ("step", "state_dict", "load_state_dict"):
        if not callable(getattr(scheduler, method, None)):
            raise InvalidTask(
                f"scheduler(optimizer) returned {type(scheduler).__name__}, which has no {method}()"
            )
    return scheduler
