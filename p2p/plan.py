"""Which samples shard v sees at step t. Pure: a function of the task's numbers and the seed.

For N samples, V shards and a global batch of B:

    shard v owns the samples v, v + V, v + 2V, … < N                    (its fixed part)
    an epoch has S = ceil(N / B) steps; step t is step k = t mod S of epoch e = t div S
    step k takes the epoch's places j = kB … min((k + 1)B, N) - 1; place j belongs to shard j mod V
    the sample at place j is  v + V * order(e, v)[j div V]  with v = j mod V
    order(e, v) sorts 0, 1, … < shard v's samples by key(i) = mix(s + (i + 1) g), modulo 2^64, where
      s = the first 8 bytes, little-endian, of SHA-256("order,seed,e,v"), g = 0x9E3779B97F4A7C15,
      mix is the output function of SplitMix64 (Steele, Lea and Flood, 2014)

So each epoch takes every sample once, shard batches differ by one sample at most, and with one
shard this is an ordinary shuffled loader. NumPy's own shuffle is not used: its stream may change
between versions. The last batch of an epoch may be incomplete, and with fewer than V samples left
some shards get none.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fault.errors import InvalidTask

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_ORDERS_KEPT = 128


class Plan:
    """The order of the data. Give either `epochs` or `steps`; raises InvalidTask as `check`."""

    def __init__(
        self,
        samples: int,
        shards: int,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        self.samples = samples
        self.shards = shards
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        if (epochs is None) == (steps is None):
            raise InvalidTask("give either epochs or steps, and not both")
        self.steps_per_epoch = -(-samples // batch_size) if batch_size > 0 else 0
        self.steps = steps if steps is not None else (epochs or 0) * self.steps_per_epoch
        self.check()

    def check(self) -> None:
        """Raises InvalidTask for numbers with which no run is possible."""
        for name in ("samples", "shards", "batch_size", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise InvalidTask(f"{name} is {getattr(self, name)}, and must be 1 at least")
        if self.samples < self.shards:
            raise InvalidTask(
                f"the dataset has {self.samples} samples, fewer than the {self.shards} shards"
            )
        if self.batch_size < self.shards:
            raise InvalidTask(
                f"the global batch_size {self.batch_size} is smaller than the {self.shards} "
                "shards, so at every step some shard would have nothing to do"
            )

    def batch_size_at(self, step: int) -> int:
        """Samples of all shards at this step."""
        places = self._places(step)
        return len(places)

    def shard_size(self, shard: int, step: int) -> int:
        return len(self._shard_places(shard, step))

    def weight(self, shard: int, step: int) -> float:
        """The shard's part of the step's samples, n_v / n."""
        return self.shard_size(shard, step) / self.batch_size_at(step)

    def first_shard(self, step: int) -> int:
        """The lowest shard that has samples at this step."""
        places = self._places(step)
        lowest = places.start % self.shards
        wraps = lowest + len(places) > self.shards
        return 0 if wraps else lowest

    def micro_batches(self, shard: int, step: int) -> list[list[int]]:
        """The samples' numbers in the dataset, in `accumulate` parts.

        The sizes of the parts differ by one at most, larger ones first; parts may be empty.
        """
        places = self._shard_places(shard, step)
        order = _order(self._part_size(shard), self.seed, step // self.steps_per_epoch, shard)
        if not places:
            return [[] for _ in range(self.accumulate)]
        first = places[0] // self.shards
        within = order[first : first + len(places)]
        indices: list[int] = (shard + self.shards * within).tolist()
        size, larger = divmod(len(indices), self.accumulate)
        ends = [size * part + min(part, larger) for part in range(self.accumulate + 1)]
        return [indices[start:end] for start, end in pairwise(ends)]

    def smallest_micro_batch(self) -> tuple[int, int, int]:
        """(samples, step, shard) of the smallest micro-batch that is not empty."""
        # which shards get one sample more repeats every V steps; only an epoch's last step differs
        last = self.steps_per_epoch - 1
        steps = sorted({*range(min(self.shards, last)), last} & set(range(self.steps)))
        sizes = [
            (max(1, self.shard_size(shard, step) // self.accumulate), step, shard)
            for step in steps
            for shard in range(self.shards)
            if self.shard_size(shard, step)
        ]
        return min(sizes)

    def _places(self, step: int) -> range:
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not one of the run's {self.steps} steps")
        start = step % self.steps_per_epoch * self.batch_size
        return range(start, min(start + self.batch_size, self.samples))

    def _shard_places(self, shard: int, step: int) -> range:
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} is not one of the run's {self.shards} shards")
        places = self._places(step)
        return places[(shard - places.start) % self.shards :: self.shards]

    def _part_size(self, shard: int) -> int:
        return len(range(shard, self.samples, self.shards))


@lru_cache(maxsize=_ORDERS_KEPT)
def _order(size: int, seed: int, epoch: int, shard: int) -> npt.NDArray[np.int64]:
    start = int.from_bytes(sha256(f"order,{seed},{epoch},{shard}".encode()).digest()[:8], "little")
    key = np.arange(1, size + 1, dtype=np.uint64)
    key *= np.uint64(_GOLDEN)
    key += np.uint64(start & _WORD)
    key ^= key >> np.uint64(30)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(27)
    key *= np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return np.argsort(key, kind="stable")
