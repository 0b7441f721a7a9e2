"""Training with the store: `Algorithm` whose contributions workers compute and the store sums, and
whose steps the store makes.

To the rest of the runtime it is an algorithm like any other: what it returns depends on state, step
and shard alone. It waits where it must, for workers that start and for a store that is restarted,
and says that it gets on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fault.errors import InputError, StoreError, StoreUnavailable
from p2p.aggregate.bulk import BulkConnection, StoreLost
from p2p.aggregate.outline import Outline
from p2p.aggregate.parts import Built
from p2p.aggregate.places import Place, Team
from p2p.aggregate.robust import RobustExchange
from p2p.aggregate.stored_optimizer import StoredOptimizer
from p2p.aggregate.stored_state import StoredState
from p2p.aggregate.storing import ensure_stored, execution
from p2p.aggregate.team import TeamLead
from p2p.algorithm import OnPart
from p2p.spec import RunSpec

Vector = npt.NDArray[np.float32]
Progress = Callable[[], None]
T = TypeVar("T")
RETRY_S = 0.2
SAY_AGAIN_S = 30.0


class DatabaseAveraging:
    """Gradient averaging in the store of this slot; `call_worker(n)` starts one."""

    def __init__(
        self,
        spec: RunSpec,
        slot: int,
        built: Built,
        call_worker: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._slot = slot
        self._built = built
        self._workers = spec.workers
        self._store = BulkConnection(spec.store_of(slot))
        self._team = TeamLead(
            Team(spec.prefix, slot),
            spec.workers,
            self._store,
            call_worker,
            self._compute_here,
            warn,
        )
        self._warn = warn
        self._inner = built.algorithm
        self._state = StoredState(spec.prefix, built, StoredOptimizer(built), self._store)
        self._exchange = RobustExchange(spec, slot, built, self._store) if spec.robust else None
        self.length = self._inner.length
        self.gradient_length = self._inner.gradient_length
        # they are called once more when they are missed, and what is wrong is said then
        with suppress(StoreUnavailable, StoreError):
            self._team.call_absent()

    def contribution(
        self, shard: int, on_progress: Progress, on_part: OnPart | None = None
    ) -> Vector:
        """The sum over the shard's parts, in order. Raises TaskRaised when the job did in one."""
        return self._until_it_works(lambda: self._contribution(shard, on_progress), on_progress)

    def loss(self, mean: Vector) -> float:
        return self._inner.loss(mean)

    def apply(self, mean: Vector, on_progress: Progress = lambda: None) -> None:
        """As `GradientAveraging.apply`, to the last bit of everything but the optimizer's own
        arithmetic, which is that of its script.
        """
        gradient, marks = self._inner.gradient_of(mean)
        rest = self._inner.rest_after(mean)

        def put_gradient(key: str) -> None:
            if self._exchange is None:
                self._store.push(key, gradient)
            else:
                self._exchange.put_mean(key, lambda shard: self._total(shard, on_progress))

        self._until_it_works(
            lambda: self._state.advance(put_gradient, marks, rest, on_progress), on_progress
        )
        self._inner.end_step(mean)

    def outline(self) -> bytes | None:
        """The state, to be sent to another peer: where the store has it. None without a store."""
        try:
            return self._state.outline(self._slot)
        except (StoreUnavailable, StoreError) as error:
            self._warn(f"a state is sent without the store: {error}")
            return None

    def whole(self, sent: bytearray, digest: str) -> bytearray:
        """The image of the state that was sent, as an outline or whole. Its digest may be wrong."""
        try:
            outline = Outline.from_bytes(sent)
            if outline is None:
                return sent
            with BulkConnection(self._spec.store_of(outline.slot)) as theirs:
                return self._state.whole(outline, digest, theirs)
        except (StoreUnavailable, StoreError, InputError, ValueError):
            return bytearray()  # it is gone, or the outline is damaged

    def _contribution(self, shard: int, on_progress: Progress) -> Vector:
        key = self._total(shard, on_progress)
        vector = self._store.pull(key, self._inner.memory.take(self.length))
        if self._exchange is None:
            self._store.execute("DEL", key)
        return vector

    def _total(self, shard: int, on_progress: Progress) -> str:
        """Has the shard's parts computed and summed, by the rule if there is one; the sum's key."""
        place = self._state.place()
        parts = range(shard * self._workers, (shard + 1) * self._workers)
        self._team.compute(place, self._built.state.step, parts, on_progress)
        inputs = [place.contribution(part) for part in parts]
        if self._exchange is not None:
            key = self._exchange.sum_up(shard, inputs)
        else:
            key = place.total(shard)
            script = ensure_stored(self._store, "total")
            self._store.execute(*execution(script, "total", inputs, [key]))
        self._store.execute("DEL", *inputs)
        return key

    def _compute_here(self, place: Place, step: int, part: int) -> None:
        vector = self._inner.contribution_at(step, part, lambda: None)
        self._store.push(place.contribution(part), vector)

    def _until_it_works(self, attempt: Callable[[], T], on_progress: Progress) -> T:
        """A store that is away is waited for; one that has lost something is given it again.

        Raises StoreError when it refuses what it is asked.
        """
        said_at = -SAY_AGAIN_S
        while True:
            on_progress()
            try:
                return attempt()
            except (StoreUnavailable, StoreLost) as error:
                if isinstance(error, StoreLost):
                    with suppress(StoreUnavailable):
                        self._state.doubt()
                elif time.monotonic() - said_at > SAY_AGAIN_S:
                    said_at = time.monotonic()
                    self._warn(f"waiting for the store: {error}")
                time.sleep(RETRY_S)
