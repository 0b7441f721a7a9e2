"""What simulated peers train: a few numbers, but real float32 sums in the real executor's order.

A contribution is drawn from (step, shard) and the state, `apply` is a short formula, and a run
without faults is computed once per shape: one executor that plays every shard.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from p2p.collectives.compression import Packing, compression
from p2p.collectives.memory import Vector
from p2p.collectives.schedule import make_schedule, make_units
from p2p.steps import Shape


@dataclass(frozen=True, slots=True)
class Reference:
    """The run in which nothing fails. `digests` has one entry more than there are steps."""

    shape: Shape
    digests: tuple[str, ...]
    states: tuple[bytes, ...]
    contributions: tuple[tuple[Vector, ...], ...]
    """`contributions[step][shard]`; to be copied, since an executor adds in place."""
    means: tuple[bytes, ...]


def digest_of(step: int, state: bytes) -> str:
    return f"{step}-{zlib.crc32(state):08x}"


def apply(state: bytes, mean: Vector) -> bytes:
    return (np.frombuffer(state, dtype=np.float32) * np.float32(0.9) + mean).tobytes()


@lru_cache(maxsize=512)
def reference(
    collective: str, shards: int, steps: int, pieces: int, compress: str = "none"
) -> Reference:
    schedule = make_schedule(collective, shards)
    length = schedule.chunks * pieces
    units = make_units(length, schedule.chunks, segment_bytes=4)
    packing = None
    if compress != "none":
        packing = Packing(compression(compress), units, length - 1, seed=0)
    shape = Shape(shards, steps, schedule, units, length, packing)
    state = np.zeros(length, dtype=np.float32).tobytes()
    digests, states, contributions, means = [digest_of(0, state)], [state], [], []
    for step in range(steps):
        draw = np.random.default_rng([step, zlib.crc32(state)])
        mine = [draw.standard_normal(length).astype(np.float32) for _ in range(shards)]
        executor = shape.executor(step)
        executor.play(range(shards))
        for shard, vector in enumerate(mine):
            executor.contribute(shard, vector.copy())
        assert executor.complete
        state = apply(state, executor.mean)
        contributions.append(tuple(mine))
        means.append(executor.mean.tobytes())
        states.append(state)
        digests.append(digest_of(step + 1, state))
    return Reference(shape, tuple(digests), tuple(states), tuple(contributions), tuple(means))
