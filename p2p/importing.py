"""Importing what is large in two thirds of the time: without the garbage collector looking on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected inside, and what was made inside is not looked through later.

    Modules stay; torch's are a million objects, which the collector would visit again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def import_torch() -> None:
    """With what the first optimizer would import, which is as much again."""
    with uncollected():
        import torch._dynamo  # noqa: F401
