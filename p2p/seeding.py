"""Where a step's randomness comes from, and what the process must be set to.

Dropout, augmentation and the like draw from the global generators of torch (CPU), NumPy and
`random`. They are seeded for each (seed, step, shard) and put back, so what is drawn depends on
neither the process nor on what it computed before.

Not covered: generators that a job makes for itself and keeps between samples, and sets of strings,
whose order follows PYTHONHASHSEED. That variable acts when a process starts; the platform sets it.
Nor other threads: the generators are the process's, so nothing that runs beside a computation may
draw from them (a retry's jitter, for one, needs a generator of its own).
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import shake_256
from typing import Any

import numpy as np
import torch

from fault.errors import InvalidTask

NO_SHARD = -1
"""In place of a shard: what a step does once for all shards, as in `apply`."""
BEFORE_STEPS = -1
"""In place of a step: what happens before the first, as building the model."""
_TWISTER_BYTES = 624 * 4
"""Of a Mersenne twister's words; in NumPy's memory the place in them follows, a 32-bit integer."""
_AT_THE_END = (624).to_bytes(4, sys.byteorder)
"""The place at which a twister makes new words before it draws."""
_TwisterMemory = ctypes.c_char * (_TWISTER_BYTES + 4)


@contextmanager
def seeded(seed: int, step: int, shard: int) -> Iterator[None]:
    """Inside, the generators start from SHAKE-256 of "seed,step,shard"; after it, as before it.

    torch takes the first 8 bytes of it, less the highest bit, and `random` the next 12, each as one
    number, little-endian; NumPy the next 2,496, as the memory of its Mersenne twister's words.
    """
    drawn = shake_256(f"{seed},{step},{shard}".encode()).digest(20 + _TWISTER_BYTES)
    # torch.manual_seed would seed every accelerator too, and formats a stack to remember it
    torchs, twister = torch.default_generator, _numpys_twister()
    numpys = _TwisterMemory.from_address(twister.ctypes.state_address)  # `twister` keeps it alive
    # NumPy's is copied and set by its memory: its functions for that, and np.random.seed, take
    # longer than all else that a short step has to seed
    before = torchs.get_state(), random.getstate(), numpys.raw
    second = _take_second_normal(numpys)
    try:
        torchs.manual_seed(int.from_bytes(drawn[:8], "little") & ((1 << 63) - 1))
        random.seed(int.from_bytes(drawn[8:20], "little"))
        numpys.raw = drawn[20:] + _AT_THE_END
        yield
    finally:
        torchs.set_state(before[0])
        random.setstate(before[1])
        _take_second_normal(numpys)
        numpys.raw = before[2]
        if second is not None:
            state = np.random.get_state(legacy=False)
            np.random.set_state({**state, "has_gauss": 1, "gauss": second})


def _numpys_twister() -> np.random.MT19937:
    """That of its global functions. Raises InvalidTask when they have another generator."""
    generator: object = vars(np.random)["get_bit_generator"]()  # which NumPy's stubs do not export
    if not isinstance(generator, np.random.MT19937):
        raise InvalidTask(
            f"NumPy's global generator is a {type(generator).__name__}; leave it the MT19937 that "
            "it is from the start, and use a Generator of your own"
        )
    return generator


def _take_second_normal(numpys: ctypes.Array[ctypes.c_char]) -> float | None:
    """Of two normal numbers that NumPy draws at once it keeps the second, beside the twister.

    Afterwards it keeps none; what it kept is returned.
    """
    before = numpys.raw
    normal = float(np.random.standard_normal())
    if numpys.raw == before:
        return normal
    np.random.standard_normal()
    return None


def configure_determinism(threads: int) -> None:
    """Settings on which a contribution's bits depend. Call it in the thread that computes.

    An operation without a deterministic form raises from then on, instead of drifting.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    same_arithmetic()


@contextmanager
def unfilled_memory() -> Iterator[None]:
    """Inside, torch leaves memory that it takes as it is, until something is written to it.

    With deterministic algorithms it would fill it first, with NaN or the largest integer, for the
    sake of programs that read what they never wrote.
    """
    settings: Any = torch.utils.deterministic  # whose types do not name this one
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def same_arithmetic() -> None:
    """Undoes what may have happened to the processor's flags in this thread.

    A library built with -ffast-math makes the thread that loads it flush denormal numbers.
    """
    torch.set_flush_denormal(False)
