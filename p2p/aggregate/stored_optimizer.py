"""A torch optimizer whose arithmetic a store does: its state as flat vectors, its step as a script.

The vectors lie as the trainable parameters do in the model's flat memory. A parameter without a
gradient in a step is in no range of that step's arguments, so neither it nor its state moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fault.errors import InvalidTask
from p2p.aggregate.parts import Built

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of optimizers is done in a store."""

    script: str
    fields: tuple[str, ...]
    """Of a parameter group: what the script gets for each range, after start and stop."""
    refused: tuple[str, ...]
    """Options that the script has not."""


_KINDS: dict[type[torch.optim.Optimizer], _Kind] = {
    torch.optim.SGD: _Kind(
        "sgd", ("lr", "momentum", "dampening", "weight_decay", "nesterov"), ("differentiable",)
    ),
    torch.optim.Adam: _Kind(
        "adam",
        ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"),
        ("differentiable", "capturable", "decoupled_weight_decay"),
    ),
    torch.optim.AdamW: _Kind(
        "adamw",
        ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"),
        ("differentiable", "capturable"),
    ),
}


class StoredOptimizer:
    """Over the optimizer of a built task. Raises InvalidTask for one that no script does."""

    def __init__(self, built: Built) -> None:
        state = built.state
        self._optimizer = state.optimizer
        self._length = built.algorithm.gradient_length
        kind = _KINDS.get(type(self._optimizer))
        if kind is None:
            known = ", ".join(each.__name__ for each in _KINDS)
            raise InvalidTask(
                f"the optimizer {type(self._optimizer).__name__} has no script for a store: "
                f"with --aggregate database it is one of {known}"
            )
        if isinstance(state.scheduler, ReduceLROnPlateau):
            raise InvalidTask("ReduceLROnPlateau has no place in a store: choose another scheduler")
        for group in self._optimizer.param_groups:
            for option in kind.refused:
                if group.get(option):
                    raise InvalidTask(f"the optimizer's {option}=True has no script for a store")
        # what torch's schedulers look at to find out that an optimizer was never used
        setattr(self._optimizer, "_opt_called", True)  # noqa: B010
        self._kind = kind
        self.script = kind.script
        self._entries = state.flat.trainable

    @property
    def _places(self) -> list[tuple[Tensor, int, int, dict[str, Any] | None]]:
        """Each parameter with where it is in a vector, and its group, which a load replaces."""
        groups = {
            id(parameter): group
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        return [
            (
                entry.tensor,
                entry.start // 4,
                entry.start // 4 + entry.tensor.numel(),
                groups.get(id(entry.tensor)),
            )
            for entry in self._entries
        ]

    # --- vectors ----------------------------------------------------------------------------

    def all_names(self) -> tuple[str, ...]:
        """Of the vectors that the optimizer's state is, as torch names them."""
        groups = self._optimizer.param_groups
        if self.script == "sgd":
            return ("momentum_buffer",) if any(group["momentum"] for group in groups) else ()
        largest = ("max_exp_avg_sq",) if any(group["amsgrad"] for group in groups) else ()
        return ("exp_avg", "exp_avg_sq", *largest)

    def vectors(self) -> dict[str, Vector]:
        """The optimizer's state; zeros where a parameter has none yet."""
        found = {name: np.zeros(self._length, np.float32) for name in self.all_names()}
        for parameter, start, _, _ in self._places:
            for name, vector in found.items():
                value = self._optimizer.state.get(parameter, {}).get(name)
                if value is not None:
                    _view(torch.from_numpy(vector), parameter, start).copy_(value)
        return found

    def memories(self) -> list[tuple[str, int, Vector]]:
        """The optimizer's tensors that lie in memory as they do in a vector.

        Of each, the vector's name, the number of the first element there, and a flat view.
        """
        found: list[tuple[str, int, Vector]] = []
        for parameter, start, stop, _ in self._places:
            for name in self.all_names():
                value = self._optimizer.state.get(parameter, {}).get(name)
                if isinstance(value, Tensor) and value.stride() == parameter.stride():
                    flat: Vector = value.as_strided((stop - start,), (1,)).numpy()
                    found.append((name, start, flat))
        return found

    def take_over(self, vectors: Mapping[str, Vector], marks: Vector) -> None:
        """The state after a step in which the marked parameters had a gradient."""
        for (parameter, start, _, group), mark in zip(self._places, marks, strict=True):
            if mark <= 0 or group is None:
                continue
            state = self._optimizer.state[parameter]
            if self.script != "sgd":
                state["step"] = torch.tensor(float(self._steps(parameter) + 1))
            for name, vector in vectors.items():
                if not self._has(group, name):
                    continue
                value = _view(torch.from_numpy(vector), parameter, start)
                if isinstance(state.get(name), Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = torch.empty_like(parameter).copy_(value)

    def _has(self, group: Mapping[str, Any], name: str) -> bool:
        if name == "momentum_buffer":
            return bool(group["momentum"])
        return name != "max_exp_avg_sq" or bool(group["amsgrad"])

    def _steps(self, parameter: Tensor) -> int:
        step = self._optimizer.state.get(parameter, {}).get("step", 0)
        return int(float(step))

    # --- a step -----------------------------------------------------------------------------

    def arguments(self, marks: Vector) -> list[str]:
        """The script's, for a step in which the marked parameters have a gradient."""
        ranges: list[list[str]] = []
        before: list[str] | None = None
        for (parameter, start, stop, group), mark in zip(self._places, marks, strict=True):
            if mark <= 0 or group is None:
                before = None
                continue
            fields = self._fields(group, parameter)
            if fields == before:
                ranges[-1][1] = str(stop)  # with the gap between them, which is zero and stays so
            else:
                ranges.append([str(start), str(stop), *fields])
            before = fields
        return [str(len(ranges)), *[word for each in ranges for word in each]]

    def _fields(self, group: Mapping[str, Any], parameter: Tensor) -> list[str]:
        words: list[str] = []
        for name in self._kind.fields:
            values = group[name] if name == "betas" else (group[name],)
            words += [_word(value) for value in values]
        if self.script == "sgd":
            known = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            return [*words, _word(known is None), _word(group["maximize"])]
        return [*words, str(self._steps(parameter) + 1)]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return repr(float(value))


def _view(vector: Tensor, parameter: Tensor, start: int) -> Tensor:
    """The parameter's elements of a flat vector, with its shape and strides."""
    return vector.as_strided(parameter.size(), parameter.stride(), start)
