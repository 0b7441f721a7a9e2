"""Gradients into a contribution while the backward pass still goes on, from the last one on.

The backward pass comes to the parameters from the last layer to the first. What it is done with is
written to its place at once, and as soon as all from there to the last gradient is, that part of
the contribution can travel. It is the same arithmetic as afterwards, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from fault.errors import InvalidTask

PART_ELEMENTS = 1 << 18
"""Of float32: a segment. Less is not worth a word to the thread that sends."""


class Place(Protocol):
    """A parameter's place in the contribution."""

    @property
    def start(self) -> int: ...

    @property
    def parameter(self) -> Tensor: ...


class GradientInPieces(InvalidTask):
    """A parameter's gradient was changed after it was handed out."""


class HandingOut:
    """Within this context, each gradient is written as soon as it is there.

    `write(n)` writes that of `places[n]`, and `tell(start)` is told that nothing from `start` on to
    the last gradient's end changes any more. Raises GradientInPieces where the backward pass comes
    to a parameter twice, as it does when it is itself run in pieces.
    """

    def __init__(
        self, places: Sequence[Place], write: Callable[[int], None], tell: Callable[[int], None]
    ) -> None:
        self._places = places
        self._write = write
        self._tell = tell
        self._hooks: list[Any] = []
        self.written = [False] * len(places)
        self._next = len(places)
        """All from here on are written."""
        self._told = places[-1].start + places[-1].parameter.numel()

    def __enter__(self) -> HandingOut:
        for number, place in enumerate(self._places):
            hook: Any = place.parameter.register_post_accumulate_grad_hook  # it has no types
            self._hooks.append(hook(partial(self._on_gradient, number)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, number: int, parameter: Tensor) -> None:
        if self.written[number]:
            raise GradientInPieces(
                "the backward pass comes to a parameter twice, so its gradient cannot be summed "
                "before the end: run it with --no-overlap"
            )
        self._write(number)
        self.written[number] = True
        while self._next > 0 and self.written[self._next - 1]:
            self._next -= 1
        if self._next < len(self._places):
            start = self._places[self._next].start
            if self._told - start >= PART_ELEMENTS:
                self._told = start
                self._tell(start)
