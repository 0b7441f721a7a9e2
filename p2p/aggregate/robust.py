"""Averages that wrong peers cannot spoil: a rule over the workers' gradients, and over the peers'.

The sum that a collective makes of the peers' vectors cannot be undone, so with a rule each peer's
vector stays in its store until the step is made, and who makes it fetches those that are in other
stores (SPIRT's exchange). The collective runs all the same: it brings what no rule is for (buffers,
marks, the loss), and when it is through, every vector is in some store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fault.errors import StoreError, StoreUnavailable
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.parts import Built
from p2p.aggregate.places import Place, places_of
from p2p.aggregate.rules import Robust
from p2p.aggregate.storing import ensure_stored, execution
from p2p.spec import RunSpec

SABOTAGE = np.float32(-10)
"""What the gradients of a sabotaged shard are multiplied with."""


class RobustExchange:
    """The vectors of one step in the stores of a run. Raises StoreUnavailable and StoreError."""

    def __init__(self, spec: RunSpec, slot: int, built: Built, store: BulkConnection) -> None:
        self._spec = spec
        self._built = built
        self._store = store
        self._robust = Robust.parse(spec.robust)
        own = spec.store_of(slot)
        self._others = [BulkConnection(url) for url in dict.fromkeys(spec.stores) if url != own]

    def sum_up(self, shard: int, parts: Sequence[str]) -> str:
        """The shard's vector out of its parts': the key that it is under."""
        key = self._announced(shard)
        length = self._built.algorithm.gradient_length
        workers = len(parts)
        # a rule needs a majority of right ones; over fewer workers there is none to find
        if self._robust.applies_to(workers):
            script = ensure_stored(self._store, "robust_total", self._robust.rule.script)
            arguments = [str(length), *self._robust.arguments(workers)]
            self._store.execute(*execution(script, "robust_total", parts, [key], arguments))
        else:
            script = ensure_stored(self._store, "total")
            self._store.execute(*execution(script, "total", parts, [key]))
        if shard in self._spec.sabotage:
            vector = self._store.pull(key)
            vector[:length] *= SABOTAGE
            self._store.push(key, vector)
        return key

    def put_mean(self, key: str, recompute: Callable[[int], str]) -> None:
        """Applies the rule to the vectors of all shards that have samples in this step."""
        shares = self._shares()
        shards = [shard for shard, share in enumerate(shares) if share > 0]
        for shard in shards:
            self._fetch(shard, recompute)
        robust = self._robust
        script = ensure_stored(self._store, "robust_mean", robust.rule.script)
        inputs = [self._key(shard) for shard in shards]
        arguments = [
            str(self._built.algorithm.gradient_length),
            *[repr(shares[shard]) for shard in shards],
            *robust.arguments(len(shards)),
        ]
        self._store.execute(*execution(script, "robust_mean", inputs, [key], arguments))

    def _place(self) -> Place:
        """Named alike in every store, which the places that stores make are not."""
        state = self._built.state
        return Place.of(self._spec.prefix, state.step, state.digest())

    def _key(self, shard: int) -> str:
        return self._place().total(shard)

    def _announced(self, shard: int) -> str:
        """The key, of a place that will be removed with those of its step."""
        step, place = self._built.state.step, self._place()
        self._store.execute("ZADD", places_of(self._spec.prefix), step, place.name)
        return place.total(shard)

    def _shares(self) -> list[float]:
        plan, step, workers = self._built.algorithm.plan, self._built.state.step, self._workers
        return [
            sum(plan.weight(shard * workers + worker, step) for worker in range(workers))
            for shard in range(self._spec.shards)
        ]

    @property
    def _workers(self) -> int:
        return max(1, self._spec.workers)

    def _fetch(self, shard: int, recompute: Callable[[int], str]) -> None:
        key = self._key(shard)
        if self._store.execute("EXISTS", key):
            return
        for other in self._others:
            try:
                vector = other.pull(key)
            except (StoreUnavailable, StoreError):
                continue  # it is in another one, or lost with this one
            self._store.push(self._announced(shard), vector)
            return
        recompute(shard)  # the store that had it was lost
