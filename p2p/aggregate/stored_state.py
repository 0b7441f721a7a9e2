"""The state of a run as a store has it, and as this process has it: published, made, taken over.

The store is where the optimizer works; this process has a copy of what came of it, for digests,
checkpoints and those who join. So a store that was lost is given the state again by whoever is
next to need it there, and nothing has to be persisted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from fault.errors import StoreError, StoreUnavailable
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.outline import Memory, Outline, cut
from p2p.aggregate.parts import Built, Bytes
from p2p.aggregate.places import Place, places_of
from p2p.aggregate.stored_optimizer import StoredOptimizer
from p2p.aggregate.storing import ensure_stored, execution

Vector = npt.NDArray[np.float32]
MAKING_MS = 5000
"""How long others leave the making of a state to the one that began it."""
GLANCE_S = 0.002
HELD_MS = 3000
"""How long a place is kept at least for those who were told to take the state from there,"""
HELD_BYTES_PER_MS = 10_000
"""and so much longer for so many bytes of it: as much as a slow link carries."""


class StoredState:
    """One process's view of the state in one store. Raises StoreUnavailable and StoreError."""

    def __init__(
        self, prefix: str, built: Built, optimizer: StoredOptimizer, store: BulkConnection
    ) -> None:
        self._prefix = prefix
        self._built = built
        self._optimizer = optimizer
        self._store = store
        self._places = places_of(prefix)
        self._at: tuple[int, Place] | None = None
        """The step that this process is at, and its place."""
        self._told: tuple[str, Place] | None = None
        """The digest of a state that another process told of, and its place."""
        self._received = np.empty_like(built.memory()[0])

    def place(self) -> Place:
        """Where the state of this process is in the store; it is put there if it is not."""
        step = self._built.state.step
        if self._at is not None and self._at[0] == step:
            place = self._at[1]
        else:
            place = self._named(step, self._built.state.digest())
            self._at = (step, place)
        if not self._store.execute("EXISTS", place.ready):
            self._publish(step, place)
        return place

    def _named(self, step: int, digest: str) -> Place:
        if self._told is not None and self._told[0] == digest:
            return self._told[1]
        return Place.of(self._prefix, step, digest)

    def doubt(self) -> None:
        """A part of what should be there is not: all of it is put there again."""
        state = self._built.state
        after = Place.after(self._prefix, state.step, state.digest())
        here = [self._at[1].ready] if self._at is not None else []
        self._store.execute("DEL", *here, after.ready, after.making)

    def _publish(self, step: int, place: Place) -> None:
        self._store.execute("ZADD", self._places, step, place.name)
        parameters, rest = self._built.memory()
        arrays = [(place.parameters, parameters)]
        arrays += [
            (place.optimizer(name), vector) for name, vector in self._optimizer.vectors().items()
        ]
        self._store.push_all(arrays)
        if len(rest):
            self._store.push(place.rest, rest)
        self._store.execute("SET", place.ready, 1)

    def advance(
        self,
        put_gradient: Callable[[str], None],
        marks: Vector,
        rest: Bytes,
        on_progress: Callable[[], None],
    ) -> None:
        """The optimizer's step in the store, and then here: parameters, optimizer, all the rest.

        `put_gradient(key)` puts the mean gradient into the store, `marks` are those of the mean,
        `rest` is the other bytes of the model after this step. Leaves the scheduler and the step's
        number to the caller. Until the store has done all of it, nothing changes here, so it can
        be tried again after whatever was raised.
        """
        state = self._built.state
        before = self.place()
        after = Place.after(self._prefix, state.step, state.digest())
        while not self._store.execute("EXISTS", after.ready):
            on_progress()
            if self._store.execute("SET", after.making, 1, "NX", "PX", MAKING_MS):
                self._make(before, after, put_gradient, marks, rest)
            else:
                time.sleep(GLANCE_S)
        self._store.pull(after.parameters, self._received)
        names = self._optimizer.all_names()
        vectors = {name: self._store.pull(after.optimizer(name)) for name in names}
        parameters_here, rest_here = self._built.memory()
        parameters_here[:] = self._received
        rest_here[:] = rest
        self._optimizer.take_over(vectors, marks)
        self._at = (state.step + 1, after)
        # the step is made here too: were it tried again, the mean would be applied twice
        with suppress(StoreUnavailable, StoreError):
            self._remove_before(state.step)  # else a later step does

    def _make(
        self,
        before: Place,
        after: Place,
        put_gradient: Callable[[str], None],
        marks: Vector,
        rest: Bytes,
    ) -> None:
        optimizer = self._optimizer
        self._store.execute("ZADD", self._places, self._built.state.step + 1, after.name)
        script = ensure_stored(self._store, optimizer.script)
        put_gradient(after.mean)
        inputs = [before.parameters, after.mean]
        inputs += [before.optimizer(name) for name in optimizer.all_names()]
        outputs = [after.parameters]
        outputs += [after.optimizer(name) for name in optimizer.all_names()]
        arguments = optimizer.arguments(marks)
        words = execution(script, optimizer.script, inputs, outputs, arguments)
        self._store.execute(*words)
        if len(rest):
            self._store.push(after.rest, rest)
        self._store.execute_all([("SET", after.ready, 1), ("DEL", after.mean, after.making)])

    def outline(self, slot: int) -> bytes:
        """What another process needs to take this state from the store of `slot`, which is ours."""
        place, state = self.place(), self._built.state
        parameters, rest = self._built.memory()
        size = parameters.nbytes * (1 + len(self._optimizer.all_names())) + rest.nbytes
        held_ms = HELD_MS + size // HELD_BYTES_PER_MS
        self._store.execute("SET", place.held, 1, "PX", held_ms)
        stored = [Memory.of(parameters, place.parameters), Memory.of(rest, place.rest)]
        stored += [
            Memory.of(tensor, place.optimizer(name), 4 * start)
            for name, start, tensor in self._optimizer.memories()
        ]
        return Outline(state.step, slot, place.name, cut(state.pieces(), stored)).to_bytes()

    def whole(self, outline: Outline, digest: str, elsewhere: BulkConnection) -> bytearray:
        """The image of the state that another process told of: from this store, or that one's.

        Whether it has this digest is for the caller to see.
        """
        self._told = digest, Place(outline.place)
        try:
            return outline.image(self._store.pull)
        except StoreError:
            return outline.image(elsewhere.pull)

    def _remove_before(self, step: int) -> None:
        """The places of earlier steps, whoever left them, but for those that are held.

        This step's own is still for those who have yet to make theirs.
        """
        names = self._store.items("ZRANGEBYSCORE", self._places, "-inf", f"({step}")
        places = [Place(name.decode()) for name in names]
        held = self._store.execute_all([("EXISTS", place.held) for place in places])
        old = [place for place, is_held in zip(places, held, strict=True) if not is_held]
        if old:
            vectors, parts = self._optimizer.all_names(), self._built.algorithm.plan.shards
            keys = [key for place in old for key in place.keys(vectors, parts)]
            gone = [place.name for place in old]
            self._store.execute_all([("DEL", *keys), ("ZREM", self._places, *gone)])
