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

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
import torch

NO_SHARD = -1
"""In place of a shard: what a step does once for all shards, as in `apply`."""
BEFORE_STEPS = -1
"""In place of a step: what happens before the first, as building the model."""


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
    states = generator.get_state(), np.random.get_state(legacy=False), random.getstate()
    try:
        generator.manual_seed(int.from_bytes(drawn[:8], "little") & ((1 << 63) - 1))
        np.random.seed(np.frombuffer(drawn[8:20], dtype="<u4"))
        random.seed(int.from_bytes(drawn[20:], "little"))
        yield
    finally:
        generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


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
