"""A model's tensors in one flat buffer, and the guard that keeps a contribution from changing it.

The buffer holds the trainable parameters, then the frozen ones, the float buffers and all other
buffers. Each starts at a multiple of 64 bytes, as torch's own tensors do: matrix kernels may sum in
another order for operands that lie elsewhere. Tied tensors are one. The module keeps its Parameter
and buffer objects; only their memory is moved.

Not here: the optimizer's state (`state.py`), and the contribution's layout (`algorithm.py`), which
follows this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import is_
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from xxhash import xxh3_64_intdigest

from fault.errors import InvalidTask

ALIGNMENT_BYTES = 64
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in the buffer; `start` and `size` are bytes."""

    name: str
    tensor: Tensor
    start: int
    size: int
    places: tuple[tuple[nn.Module, str], ...]
    """Where the tensor is registered; several when it is tied."""


class FlatModel:
    """Moves the model's tensors. Raises InvalidTask for one that cannot be trained exactly."""

    def __init__(self, model: nn.Module) -> None:
        _refuse_modules(model)
        self.model = model
        parameters = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        for name, parameter in parameters.items():
            _refuse_parameter(name, parameter)
        for name, buffer in buffers.items():
            _refuse_buffer(name, buffer)
        _refuse_overlap({**parameters, **buffers})
        float_buffers = {n: b for n, b in buffers.items() if b.dtype == torch.float32}
        places = _places(model)
        self._end = 0
        self.trainable = self._lay_out(
            {n: p for n, p in parameters.items() if p.requires_grad}, places
        )
        self.frozen = self._lay_out(
            {n: p for n, p in parameters.items() if not p.requires_grad}, places
        )
        self._buffers_start = self._end
        self.float_buffers = self._lay_out(float_buffers, places)
        self.integer_buffers = self._lay_out(
            {n: b for n, b in buffers.items() if n not in float_buffers}, places
        )
        self.entries = (*self.trainable, *self.frozen, *self.float_buffers, *self.integer_buffers)
        self.memory = _aligned_bytes(self._end)
        """The whole buffer, uint8."""
        self._flat = torch.from_numpy(self.memory)
        with torch.no_grad():
            for entry in self.entries:
                self._move(entry)
        self._parameter_bytes = [
            self.bytes_of(entry).data for entry in (*self.trainable, *self.frozen)
        ]
        self._registered = [
            (module, tuple(module._parameters.items()), tuple(module._buffers.items()))
            for module in model.modules()
        ]
        self._sizes, self._keys, self._values = self._stock()
        if not model.training:
            model.train()
        self._modes = [(module, module.training) for module in model.modules()]

    def _lay_out(
        self, tensors: dict[str, Tensor], places: dict[int, list[tuple[nn.Module, str]]]
    ) -> tuple[Entry, ...]:
        entries = []
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            entries.append(Entry(name, tensor, self._end, size, tuple(places[id(tensor)])))
            self._end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return tuple(entries)

    def _move(self, entry: Entry) -> None:
        tensor = entry.tensor
        bytes_ = self._flat[entry.start : entry.start + entry.size]
        elements = bytes_.view(tensor.dtype)
        if is_dense(tensor):  # keeps channels_last and the like
            view = elements.as_strided(tensor.size(), tensor.stride())
        else:
            view = elements.view(tensor.size())
        view.copy_(tensor.detach())
        # by `.data`, so the parameter keeps a version counter of its own: a buffer that is changed
        # in the forward pass must not look to autograd as if the parameters were
        tensor.data = view

    def training_mode(self) -> None:
        """Puts every module into the mode it was handed over in."""
        for module, training in self._modes:
            if module.training is not training:  # which is slow to set
                module.training = training

    @contextmanager
    def untouched(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Puts the buffers back afterwards; yields their bytes as they are before.

        Raises InvalidTask when parameters were changed, or when a parameter or a buffer was
        registered, removed or replaced by one of another shape.
        """
        checksums = self._parameter_checksums()
        saved = self.memory[self._buffers_start :].copy()
        try:
            yield saved
            self._refuse_changes(checksums)
        finally:
            if not self._is_registered_as_before():
                for module, parameters, buffers in self._registered:
                    _restore(module._parameters, parameters)
                    _restore(module._buffers, buffers)
            self.memory[self._buffers_start :] = saved

    def take_in_replaced_buffers(self) -> None:
        """Copies into the buffer what the forward pass registered in place of its tensors.

        Raises InvalidTask when the new tensor does not fit the old one.
        """
        for entry in (*self.float_buffers, *self.integer_buffers):
            old = entry.tensor
            for module, key in entry.places:
                new = module._buffers.get(key)
                if new is old:
                    continue
                if new is None or (new.dtype, new.size()) != (old.dtype, old.size()):
                    raise InvalidTask(
                        f"the forward pass replaces the buffer {entry.name!r} by something of "
                        "another dtype or shape; a state has a fixed layout"
                    )
                with torch.no_grad():
                    old.copy_(new)

    def bytes_of(self, entry: Entry) -> npt.NDArray[np.uint8]:
        """The tensor's bytes in the buffer, not a copy."""
        return self.memory[entry.start : entry.start + entry.size]

    def _stock(self) -> tuple[list[int], list[str], list[Tensor | None]]:
        """Of the modules' registered tensors how many each has, their keys, and they themselves."""
        registered = [
            each
            for module, _, _ in self._registered
            for each in (module._parameters, module._buffers)
        ]
        values = chain.from_iterable([each.values() for each in registered])
        return [*map(len, registered)], [*chain.from_iterable(registered)], [*values]

    def _is_registered_as_before(self) -> bool:
        """All modules together: one by one takes long. False may be no more than the order."""
        sizes, keys, values = self._stock()
        is_as_many = sizes == self._sizes and keys == self._keys
        return is_as_many and all(map(is_, values, self._values))

    def _parameter_checksums(self) -> list[int]:
        return [xxh3_64_intdigest(each) for each in self._parameter_bytes]

    def _refuse_changes(self, checksums: list[int]) -> None:
        after = self._parameter_checksums()
        for entry, old, new in zip((*self.trainable, *self.frozen), checksums, after, strict=True):
            if old != new:
                raise InvalidTask(
                    f"the forward pass, the loss or the backward pass changes the parameter "
                    f"{entry.name!r} in place; only the optimizer may"
                )
        if self._is_registered_as_before():
            return
        for module, parameters, buffers in self._registered:
            for kind, now, before in (
                ("parameter", module._parameters, parameters),
                ("buffer", module._buffers, buffers),
            ):
                if _is_as(now, before):
                    continue
                changed = {k for k, v in before if (now.get(k) is None) != (v is None)}
                if kind == "parameter":
                    changed |= {k for k, v in before if now.get(k) is not v}
                if changed or now.keys() != dict(before).keys():
                    names = sorted(changed | (now.keys() ^ dict(before).keys()))
                    raise InvalidTask(
                        f"the forward pass makes, removes or replaces the {kind} {names[0]!r} of "
                        f"{type(module).__name__}; do that where the model is built"
                    )


def _aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory that starts where torch would have it start."""
    memory = np.zeros(size + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    dimensions = zip(tensor.stride(), tensor.size(), strict=True)
    for stride, size in sorted(each for each in dimensions if each[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_as(now: Mapping[str, object], before: Sequence[tuple[str, object]]) -> bool:
    return len(now) == len(before) and all(now.get(k, before) is v for k, v in before)


def _restore(now: dict[str, T], before: tuple[tuple[str, T], ...]) -> None:
    if not _is_as(now, before):
        now.clear()
        now.update(before)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for registered in (module._parameters, module._buffers):
            for key, tensor in registered.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, key))
    return places


def _refuse_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise InvalidTask(
                f"{where} is compiled: what a compiled module computes depends on the shapes the "
                "process saw before; hand in the plain module"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InvalidTask(
                f"{where} keeps state outside of tensors (get_extra_state), which cannot be "
                "carried from peer to peer; keep it in a buffer"
            )


def _refuse_parameter(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise InvalidTask(
            f"the parameter {name!r} has no shape yet; run the lazy module once inside task()"
        )
    if parameter.dtype in INTEGER_DTYPES and not parameter.requires_grad:
        _refuse_place("parameter", name, parameter)
        return
    _refuse_dtype("parameter", name, parameter)
    _refuse_place("parameter", name, parameter)


def _refuse_buffer(name: str, buffer: Tensor) -> None:
    if is_lazy(buffer):
        raise InvalidTask(
            f"the buffer {name!r} has no shape yet; run the lazy module once inside task()"
        )
    if buffer.dtype not in INTEGER_DTYPES:
        _refuse_dtype("buffer", name, buffer)
    if buffer.requires_grad:
        raise InvalidTask(f"the buffer {name!r} requires a gradient; make it a parameter")
    _refuse_place("buffer", name, buffer)


def _refuse_dtype(kind: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InvalidTask(
            f"the {kind} {name!r} is {dtype}; what peers exchange is float32, so it must be too"
        )


def _refuse_place(kind: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InvalidTask(
            f"the {kind} {name!r} is on {tensor.device} with layout {tensor.layout}; it must be an "
            "ordinary tensor on the CPU"
        )


def _refuse_overlap(tensors: dict[str, Tensor]) -> None:
    """Two tensors over one memory would be torn apart; tying goes by sharing the object."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            reach = sum(
                (size - 1) * stride
                for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise InvalidTask(
                f"{first!r} and {second!r} are different tensors over the same memory; to tie "
                "them, register one and the same object under both names"
            )
