"""What a shard adds to a step, and what a step does with the mean. Pure, bit for bit.

`Algorithm` is the seam: the rest of the runtime knows a contribution as a flat float32 vector and
nothing more. `GradientAveraging` is ordinary data-parallel training.

Not here: the order in which contributions are summed (`collectives/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import default_collate
from xxhash import xxh3_128

from fault.errors import ImpureTask, InvalidTask
from p2p.collectives.memory import Memory, PlainMemory
from p2p.flat import Entry
from p2p.handout import PART_ELEMENTS, GradientInPieces, HandingOut
from p2p.plan import Plan
from p2p.seeding import NO_SHARD, same_arithmetic, seeded, unfilled_memory
from p2p.state import TrainingState
from p2p.task import Task

Vector = npt.NDArray[np.float32]
Progress = Callable[[], None]
OnPart = Callable[[Vector, int, int], None]
"""Told of a contribution whose elements in this range do not change any more."""


class Algorithm(Protocol):
    length: int
    """Elements of a contribution,"""
    gradient_length: int
    """and so many of them, at its beginning, are gradients."""

    def contribution(
        self, shard: int, on_progress: Progress, on_part: OnPart | None = None
    ) -> Vector:
        """What the shard adds to the mean at the state's step; leaves the state untouched.

        `on_progress` is called after each sample that was fetched and after each micro-batch, and
        `on_part` may be while it is computed.
        """

    def loss(self, mean: Vector) -> float:
        """The step's loss, which may be no finite number; that is the caller's to judge."""

    def apply(self, mean: Vector, on_progress: Progress = lambda: None) -> None:
        """Turns the state into that of the next step. `mean` is the sum of all contributions."""


class GradientAveraging:
    """A contribution is the gradient of the mean loss over the shard's samples, times n_v / n.

    The vector has five parts, and the sum over the shards is the mean over the global batch:

    - *gradients* of the trainable parameters, laid out as these are in the state's flat buffer;
    - *float buffers* as the shard's forward passes left them, times n_v / n;
    - *integer and boolean buffers*: those that the lowest shard with samples leaves behind, in
      16-bit pieces, each a whole number that float32 holds exactly; zero from all other shards. So
      they advance once per step, by what one shard's forward passes do to them;
    - *marks*: n_v / n for each parameter that had a gradient and each float buffer that changed.
      Without any, a parameter's gradient is missing and not zero, and a buffer keeps its bits;
    - *loss*, times n_v / n.

    A shard without samples contributes zeros.
    """

    def __init__(self, task: Task, state: TrainingState, plan: Plan) -> None:
        self.task = task
        self.state = state
        self.plan = plan
        self.memory: Memory = PlainMemory()
        """Where contributions lie."""
        self.fills_memory = False
        """Whether torch fills memory that a contribution takes: slow, but it shows who reads it."""
        flat = state.flat
        if not flat.trainable:
            raise InvalidTask("the model has no parameter that requires a gradient")
        self._gradients = [_Part.of(e, e.start // 4, e.tensor.numel()) for e in flat.trainable]
        self.gradient_length = end = self._gradients[-1].end
        """Elements of the trainable parameters, with the gaps between them."""
        self._floats = []
        for entry in flat.float_buffers:
            self._floats.append(_Part.of(entry, end, entry.tensor.numel()))
            end = self._floats[-1].end
        self._integers = []
        for entry in flat.integer_buffers:
            self._integers.append(_Part.of(entry, end, -(-entry.size // 2)))
            end = self._integers[-1].end
        self._marks = end
        gaps = np.ones(self.gradient_length, bool)
        for part in self._gradients:
            gaps[part.start : part.end] = False
        self._gaps = np.flatnonzero(gaps)
        """Elements between gradients."""
        self.length = end + len(self._gradients) + len(self._floats) + 1

    def contribution(
        self, shard: int, on_progress: Progress, on_part: OnPart | None = None
    ) -> Vector:
        """Raises InvalidTask for a task that cannot be computed exactly, and whatever the task
        raises; the state is untouched even then.
        """
        return self.contribution_at(self.state.step, shard, on_progress, on_part)

    def loss(self, mean: Vector) -> float:
        return float(mean[-1])

    def apply(self, mean: Vector, on_progress: Progress = lambda: None) -> None:
        state = self.state
        gradient, marks = self.gradient_of(mean)
        self._advance_buffers(mean, state.flat.memory, 0)
        means = torch.from_numpy(gradient)
        try:
            with unfilled_memory():
                for part, mark in zip(self._gradients, marks, strict=True):
                    # a copy, since an optimizer may change gradients in place and the mean is kept
                    # to be sent; one by one, they lie where those of the backward pass lay
                    part.entry.tensor.grad = part.view(means).clone() if mark > 0 else None
            # filled: what an optimizer keeps is part of the state, whether it wrote to it or not
            with seeded(self.task.seed, state.step, NO_SHARD), torch.enable_grad():
                state.optimizer.step()
        finally:
            self._drop_gradients()
        self.end_step(mean)

    def gradient_of(self, mean: Vector) -> tuple[Vector, Vector]:
        """The mean gradient, laid out as the trainable parameters are, and its marks.

        Raises ValueError for a vector that is no mean.
        """
        if mean.shape != (self.length,) or mean.dtype != np.float32:
            raise ValueError(f"a mean of {mean.shape} {mean.dtype}, expected {self.length} float32")
        return mean[: self.gradient_length], self._split_marks(mean)[0]

    def rest_after(self, mean: Vector) -> npt.NDArray[np.uint8]:
        """The bytes of all but the trainable parameters, as this mean leaves them; a copy."""
        start = 4 * self.gradient_length
        rest = self.state.flat.memory[start:].copy()
        self._advance_buffers(mean, rest, start)
        return rest

    def _advance_buffers(self, mean: Vector, memory: npt.NDArray[np.uint8], origin: int) -> None:
        """`memory` is what comes from `origin` on in the state's."""
        for part, mark in zip(self._floats, self._split_marks(mean)[1], strict=True):
            if mark > 0:
                part.in_memory(memory, np.float32, origin)[:] = mean[part.start : part.end]
        for part in self._integers:
            part.in_memory(memory, np.uint16, origin)[:] = mean[part.start : part.end]

    def end_step(self, mean: Vector) -> None:
        """What follows the optimizer: the scheduler, and the state's next number."""
        state = self.state
        if isinstance(state.scheduler, ReduceLROnPlateau):
            state.scheduler.step(self.loss(mean))
        elif state.scheduler is not None:
            state.scheduler.step()
        state.step += 1

    def rehearse(self, on_progress: Progress) -> bool:
        """Computes the smallest micro-batch, and one contribution twice, once handing out parts.

        The second time, what torch takes of memory is filled, so that a job which reads what was
        never written computes something else than the first time.

        Returns whether parts can be handed out. Raises as `try_smallest_batch`, and ImpureTask when
        the contributions differ. Leaves the state untouched.
        """
        self.try_smallest_batch(on_progress)
        can_hand_out = True
        whole = self.contribution(0, on_progress)
        self.fills_memory = True
        try:
            handed_out = self.contribution(0, on_progress, lambda *_: None)
        except GradientInPieces:
            can_hand_out, handed_out = False, self.contribution(0, on_progress)
        finally:
            self.fills_memory = False
        first, second = self.tensors(whole), self.tensors(handed_out)
        for name, values in first.items():
            if values.tobytes() != second[name].tobytes():
                raise ImpureTask(
                    f"two computations of one contribution differ, first in the {name}: the job "
                    "keeps something between samples or batches besides parameters and buffers, "
                    "such as a generator or a counter of its own, or reads memory that was never "
                    "written; 'p2p-launch check' says more"
                )
        return can_hand_out

    def try_smallest_batch(self, on_progress: Progress) -> None:
        """Raises InvalidTask when the model cannot compute so few samples at once, and whatever
        the task raises. Leaves the state untouched.
        """
        samples, step, shard = self.plan.smallest_micro_batch()
        try:
            self.contribution_at(step, shard, on_progress)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InvalidTask(
                f"at step {step}, shard {shard} computes a batch of {samples}, too few for the "
                "model's batch normalization; change batch_size, accumulate, the number of shards "
                "or of samples"
            ) from error

    def tensors(self, vector: Vector) -> dict[str, npt.NDArray[np.generic]]:
        """A contribution's parts, one-dimensional, by what they are in words; in the vector's
        order. Integer buffers are in 16-bit pieces.
        """
        named: dict[str, npt.NDArray[np.generic]] = {}
        for kind, parts in (
            ("gradient of", self._gradients),
            ("buffer", self._floats),
            ("buffer", self._integers),
        ):
            for part in parts:
                named[f"{kind} {part.entry.name!r}"] = vector[part.start : part.end]
        named["marks of what has a gradient or changes"] = vector[self._marks : -1]
        named["loss"] = vector[-1:]
        return named

    def contribution_at(
        self, step: int, shard: int, on_progress: Progress, on_part: OnPart | None = None
    ) -> Vector:
        """As `contribution`, to a step that need not be the state's own."""
        vector = self.memory.take(self.length)
        if self.plan.shard_size(shard, step) == 0:
            vector.fill(0)
            return vector
        # but for the gradients, which are all written to
        vector[self._gaps] = 0
        vector[self.gradient_length :] = 0
        same_arithmetic()
        flat = self.state.flat
        flat.training_mode()
        self._drop_gradients()
        try:
            with (
                flat.untouched() as buffers,
                nullcontext() if self.fills_memory else unfilled_memory(),
                seeded(self.task.seed, step, shard),
                torch.enable_grad(),
            ):
                weight = self.plan.weight(shard, step)
                handing_out = self._handing_out(vector, weight, on_part)
                loss = self._backward(step, shard, on_progress, handing_out or nullcontext())
                flat.take_in_replaced_buffers()
                written = handing_out.written if handing_out is not None else []
                self._write(vector, step, shard, loss, buffers, written)
        finally:
            self._drop_gradients()
        return vector

    def _handing_out(
        self, vector: Vector, weight: float, on_part: OnPart | None
    ) -> HandingOut | None:
        """For the backward pass that completes the gradients; None if there would be no part."""
        if on_part is None or self.gradient_length < PART_ELEMENTS:
            return None
        views, end = torch.from_numpy(vector), self.gradient_length
        scale = torch.tensor(weight, dtype=torch.float32)
        return HandingOut(
            self._gradients,
            lambda place: self._gradients[place].write_gradient(views, scale),
            lambda start: on_part(vector, start, end),
        )

    def _backward(
        self,
        step: int,
        shard: int,
        on_progress: Progress,
        handing_out: AbstractContextManager[object],
    ) -> float:
        """Leaves the gradient of the shard's mean loss in the parameters; the loss."""
        task, size = self.task, self.plan.shard_size(shard, step)
        total = 0.0
        batches = [indices for indices in self.plan.micro_batches(shard, step) if indices]
        for number, indices in enumerate(batches):
            is_last = number == len(batches) - 1
            samples = []
            for index in indices:
                samples.append(_sample(task.dataset[index], index))
                on_progress()
            inputs, targets = default_collate(samples)
            loss: object = task.loss(task.model(inputs), targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise InvalidTask(
                    f"loss(output, target) returned {_described(loss)}, not a tensor with the mean "
                    "over the batch as its one element"
                )
            share = len(indices) / size
            # without accumulation exactly what an ordinary loop does
            with handing_out if is_last else nullcontext():
                torch.autograd.backward(loss if share == 1.0 else loss * share)
            total += float(loss.detach()) * share
            on_progress()
        return total

    def _write(
        self,
        vector: Vector,
        step: int,
        shard: int,
        loss: float,
        buffers: npt.NDArray[np.uint8],
        written: Sequence[bool],
    ) -> None:
        """Fills the vector but for the gradients that are `written`.

        `buffers` are the bytes of the buffers before the forward pass.
        """
        weight = self.plan.weight(shard, step)
        memory = self.state.flat.memory
        views, scale = torch.from_numpy(vector), torch.tensor(weight, dtype=torch.float32)
        gradient_marks, float_marks = self._split_marks(vector)
        for place, part in enumerate(self._gradients):
            if part.entry.tensor.grad is not None:
                if not written or not written[place]:
                    part.write_gradient(views, scale)
                gradient_marks[place] = weight
            else:
                vector[part.start : part.end] = 0
        before = len(memory) - len(buffers)
        for place, part in enumerate(self._floats):
            values = part.in_memory(memory, np.float32)
            np.multiply(values, np.float32(weight), out=vector[part.start : part.end])
            start = part.entry.start - before
            if values.tobytes() != buffers[start : start + part.entry.size].tobytes():
                float_marks[place] = weight
        if shard == self.plan.first_shard(step):
            for part in self._integers:
                vector[part.start : part.end] = part.in_memory(memory, np.uint16)
        vector[-1] = loss * weight

    def _split_marks(self, vector: Vector) -> tuple[Vector, Vector]:
        middle = self._marks + len(self._gradients)
        return vector[self._marks : middle], vector[middle:-1]

    def _drop_gradients(self) -> None:
        for part in self._gradients:
            part.entry.tensor.grad = None


def probe(state: TrainingState, algorithm: Algorithm, on_progress: Progress = lambda: None) -> str:
    """What this process makes of the task: equal among processes that compute the same bits.

    The digest of the state, of shard 0's contribution to step 0, and of the state that applying
    this contribution gives; the state is put back. Only for a state before its first step. It also
    brings in what torch imports at the first optimizer step, which takes a second.
    """
    if state.step != 0:
        raise ValueError(f"a probe is of the state before step 0, this one is at step {state.step}")
    image = state.image()
    probed = xxh3_128(image)
    contribution = algorithm.contribution(0, on_progress)
    probed.update(contribution.data)
    algorithm.apply(contribution)
    probed.update(state.digest().encode())
    state.load(image)
    return probed.hexdigest()


@dataclass(frozen=True, slots=True)
class _Part:
    """The elements of a contribution that stand for one tensor of the state."""

    entry: Entry
    start: int
    length: int
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, entry: Entry, start: int, length: int) -> _Part:
        return cls(entry, start, length, entry.tensor.size(), entry.tensor.stride())

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def parameter(self) -> Tensor:
        return self.entry.tensor

    def write_gradient(self, vector: Tensor, weight: Tensor) -> None:
        """`weight` is a float32 scalar: from a Python number torch would make one each time."""
        gradient = self.entry.tensor.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        if gradient.requires_grad:
            gradient = gradient.detach()
        torch.mul(gradient, weight, out=self.view(vector))

    def view(self, vector: Tensor) -> Tensor:
        """The elements with the shape and the strides of the tensor."""
        return vector.as_strided(self.size, self.stride, self.start)

    def in_memory(
        self, memory: npt.NDArray[np.uint8], dtype: type[np.generic], origin: int = 0
    ) -> Any:
        """The tensor's bytes in the state, of which `memory` is what comes from `origin` on.

        An odd last byte goes with the zero that follows it.
        """
        start = self.entry.start - origin
        return memory[start : start + self.length * np.dtype(dtype).itemsize].view(dtype)


def _sample(sample: Any, index: int) -> Any:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise InvalidTask(f"dataset[{index}] is {_described(sample)}, not a pair (input, target)")
    return tuple(sample)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
