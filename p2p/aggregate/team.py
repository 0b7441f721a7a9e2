"""A peer and its workers: who is there, who is called, who has which part of the samples.

Workers take tasks from a queue in the store as they come to it, so none has parts of its own, and
one that is slow or dead delays nothing that another could do. A task is put back into the queue
when it is in nobody's hands: neither waiting there, nor named by a living worker, nor done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from fault.errors import StoreError, TaskRaised
from p2p.aggregate.bulk import BulkConnection, StoreLost
from p2p.aggregate.places import Part, Place, Presence, Result, Team

Progress = Callable[[], None]
WAIT_S = 0.25
CALL_AGAIN_S = 10.0
"""A worker that was called and does not say a word for so long is called once more."""
ALONE_S = 20.0
"""Without any worker for so long, the peer computes a part itself."""


class TeamLead:
    """Hands out the parts of a step and waits for them. Raises StoreUnavailable and StoreError.

    `call(n)` starts worker n; `compute_here(part)` computes one in this process and stores it.
    """

    def __init__(
        self,
        team: Team,
        workers: int,
        store: BulkConnection,
        call: Callable[[int], None],
        compute_here: Callable[[Place, int, int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._team = team
        self._workers = workers
        self._store = store
        self._call = call
        self._compute_here = compute_here
        self._warn = warn
        self._alone = False
        self._called_at = [-float("inf")] * workers
        self._progress: dict[str, int] = {}
        self._seen_at = time.monotonic()

    def call_absent(self) -> dict[int, Presence]:
        """Calls the workers that say nothing; those that do say something."""
        there = self._present()
        now = time.monotonic()
        if there:
            self._seen_at, self._alone = now, False
        for worker in range(self._workers):
            if worker not in there and now - self._called_at[worker] > CALL_AGAIN_S:
                self._called_at[worker] = now
                self._call(worker)
        return there

    def compute(self, place: Place, step: int, parts: range, on_progress: Progress) -> None:
        """Returns when each part's contribution is in the place.

        Raises TaskRaised when the job raised in a worker, and StoreLost when the state that
        workers are to start from is not there any more.
        """
        missing = self._without_result(place, parts)
        lost_before: set[int] = set()
        self._hand_out(place, step, missing)
        while missing:
            result = self._next_result()
            if result is not None:
                if result.expiring >= 0:
                    self._called_at[result.expiring] = time.monotonic()
                    self._call(result.expiring)
                elif result.place == place.name and result.part in parts:
                    if result.refused:
                        raise StoreError(result.refused)
                    if result.error:
                        raise TaskRaised(f"a worker raised in part {result.part}", result.error)
                    missing.discard(result.part)
                on_progress()
                continue
            there = self.call_absent()
            self._notice(there, on_progress)
            missing = self._without_result(place, missing)
            lost = missing - self._in_hands(there, place, step)
            if lost and not self._store.execute("EXISTS", place.ready):
                raise StoreLost(f"there is no {place.name} any more")
            # between queue and word it is in nobody's hands for a moment, but not for two glances
            self._hand_out(place, step, lost & lost_before)
            lost_before = lost - lost_before
            if missing and time.monotonic() - self._seen_at > ALONE_S:
                if not self._alone:
                    self._alone = True
                    self._warn(f"no worker for {ALONE_S:.0f} s (see their logs): computing alone")
                self._compute_here(place, step, min(missing))

    def _hand_out(self, place: Place, step: int, parts: Collection[int]) -> None:
        tasks = [Part(place.name, step, part).to_text() for part in sorted(parts)]
        if tasks:
            self._store.execute("RPUSH", self._team.tasks, *tasks)

    def _next_result(self) -> Result | None:
        found = self._store.items("BLPOP", self._team.results, str(WAIT_S))
        return Result.from_text(found[1]) if found else None

    def _without_result(self, place: Place, parts: Collection[int]) -> set[int]:
        commands = [("EXISTS", place.contribution(part)) for part in parts]
        there = self._store.execute_all(commands)
        return {part for part, exists in zip(parts, there, strict=True) if not exists}

    def _present(self) -> dict[int, Presence]:
        said = self._store.items("MGET", *map(self._team.worker, range(self._workers)))
        return {n: Presence.from_text(text) for n, text in enumerate(said) if text is not None}

    def _in_hands(self, there: dict[int, Presence], place: Place, step: int) -> set[int]:
        queued = self._store.items("LRANGE", self._team.tasks, 0, -1)
        texts = [*queued, *[presence.task.encode() for presence in there.values() if presence.task]]
        tasks = [Part.from_text(text) for text in texts]
        return {task.part for task in tasks if (task.place, task.step) == (place.name, step)}

    def _notice(self, there: dict[int, Presence], on_progress: Progress) -> None:
        """The peer gets on as long as its workers do, or may still be starting."""
        progress = {presence.nonce: presence.progress for presence in there.values()}
        starting = time.monotonic() - max(self._called_at) < CALL_AGAIN_S
        if progress != self._progress or starting:
            on_progress()
        self._progress = progress
