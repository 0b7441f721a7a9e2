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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256

import numpy as np
import torch

NO_SHARD = -1
"""In place of a shard: what a step does once for all shards, as in `apply`."""
BEFORE_STEPS = -1
"""In place of a step: what happens before the first, as building the model."""
_MT19937_BYTES = 625 * 4
"""Of a Mersenne twister: 624 words and the place in them."""


@contextmanager
def seeded(seed: int, step: int, shard: int) -> Iterator[None]:
    """Inside, the generators start from SHA-256 of "seed,step,shard"; after it, as before it.

    torch takes the first 8 bytes of the hash, less the highest bit; NumPy the next 12, as three
    32-bit words; `random` the last 12, as one number; all little-endian. NumPy and `random` are one
    algorithm with one way to be seeded, so from the same bytes they would draw the same numbers.
    """
    drawn = sha256(f"{seed},{step},{shard}".encode()).digest()
    # torch.manual_seed would seed every accelerator too, and formats a stack to remember it
    generator = torch.default_generator
    states = generator.get_state(), random.getstate()
    put_numpys_back = _numpys_put_back()
    try:
        generator.manual_seed(int.from_bytes(drawn[:8], "little") & ((1 << 63) - 1))
        np.random.seed(np.frombuffer(drawn[8:20], dtype="<u4"))
        random.seed(int.from_bytes(drawn[20:], "little"))
        yield
    finally:
        generator.set_state(states[0])
        put_numpys_back()
        random.setstate(states[1])


def _numpys_put_back() -> Callable[[], None]:
    """What puts NumPy's global generator back as it is now; it is not so any more.

    To read and write its state takes longer than all else that a short step has to seed, so its
    memory is copied. What is not there is the second of two normal numbers, of which NumPy draws
    the first when it is asked for one, and keeps the other: that is drawn to see whether it is one.
    """
    generator: object = vars(np.random)["get_bit_generator"]()  # which NumPy's stubs do not export
    if not isinstance(generator, np.random.MT19937):
        return partial(np.random.set_state, np.random.get_state(legacy=False))
    memory = _memory(generator)
    normal = np.random.standard_normal()
    if _memory(generator) == memory:
        state = {**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": normal}
        return partial(np.random.set_state, state)
    return partial(_put_back, generator, memory)


def _put_back(generator: np.random.MT19937, memory: bytes) -> None:
    ctypes.memmove(generator.ctypes.state_address, memory, _MT19937_BYTES)
    np.random.standard_normal()
    if _memory(generator) != memory:  # it was the first of two
        np.random.standard_normal()
        ctypes.memmove(generator.ctypes.state_address, memory, _MT19937_BYTES)


def _memory(generator: np.random.MT19937) -> bytes:
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


def configure_determinism(threads: int) -> None:
    """Settings on which a contribution's bits depend. Call it in the thread that computes.

    An operation without a deterministic form raises from then on, instead of drifting.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    same_arithmetic()


def same_arithmetic() -> None:
    """Undoes what may have happened to the processor's flags in this thread.

    A library built with -ffast-math makes the thread that loads it flush denormal numbers.
    """
    torch.set_flush_denormal(False)
