"""A worker's life: it is fed parts of the samples, step by step, and keeps nothing.

It takes a task from its peer's store, the parameters from there as well, computes what the part
adds to the step, and leaves that in the store. Nobody misses a worker that dies: its peer sees that
its word is gone and gives the task to another.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fault.errors import MayflyError, Refused, StoreError, StoreUnavailable
from fault.records import Timing
from fault.registry import Registry
from p2p.aggregate.bulk import BulkConnection, StoreLost
from p2p.aggregate.places import Part, Place, Presence, Result, Team, WorkerInvocation
from p2p.importing import import_torch
from p2p.spec import RunSpec, job_digest

REGISTRY_TIMEOUT_S = 10.0
SAY_EVERY_S = 0.3
WORD_LIFE_S = 1.5
"""A worker that has not said a word for so long is dead."""
IDLE_S = 0.5
IDLE_LIMIT_S = 20.0
"""Without a task for so long, it looks whether there still is a run."""
EXPIRING_S = 8.0
"""So long before its deadline it asks for a successor: time for a cold start. A third of a life,
where that is less."""
LAST_MOMENT_S = 1.5
RETRY_S = 0.2


def serve(invocation: WorkerInvocation, deadline: float = float("inf")) -> dict[str, Any]:
    """Lives one invocation to its end, or to the deadline in seconds of `time.monotonic`.

    Says how it ended.

    Raises what the task raises while it is built: its peer's own does the same, and says so.
    """
    registry = Registry(invocation.registry, invocation.run, Timing(), REGISTRY_TIMEOUT_S)
    try:
        registry.wait_until_up(REGISTRY_TIMEOUT_S)
        text = registry.spec()
        if not text:
            return {"worker": invocation.worker, "reason": f"there is no run {invocation.run}"}
        worker = _Worker(invocation, deadline, RunSpec.from_json(text), registry)
        return {"worker": invocation.worker, "reason": worker.live()}
    finally:
        registry.close()


class _Voice:
    """Says in the store that the worker lives, and hears whether another has its place."""

    def __init__(self, url: str, key: str, nonce: str) -> None:
        self._store = BulkConnection(url, timeout_s=WORD_LIFE_S)
        self._key = key
        self._nonce = nonce
        self._presence = Presence(nonce)
        self._changed = threading.Event()
        self._over = False
        self.replaced = False
        self._thread = threading.Thread(target=self._run, name="voice", daemon=True)

    def start(self) -> None:
        self._say(force=True)
        self._thread.start()

    def at(self, task: str) -> None:
        self._presence = replace(self._presence, task=task, progress=self._presence.progress + 1)

    def progress(self) -> None:
        self._presence = replace(self._presence, progress=self._presence.progress + 1)

    def close(self) -> None:
        self._over = True
        self._changed.set()
        self._thread.join(WORD_LIFE_S)
        self._store.close()

    def _run(self) -> None:
        while not self._changed.wait(SAY_EVERY_S) and not self.replaced:
            self._say(force=False)

    def _say(self, force: bool) -> None:
        """The place is that of the newest worker that came."""
        try:
            said = self._store.execute("GET", self._key)
            if not force and isinstance(said, bytes):
                self.replaced = Presence.from_text(said).nonce != self._nonce
            if not self.replaced:
                life_ms = int(WORD_LIFE_S * 1000)
                self._store.execute("SET", self._key, self._presence.to_text(), "PX", life_ms)
        except (StoreUnavailable, StoreError):
            pass  # the store is restarted, or reads its files: the next word may be heard


class _Worker:
    def __init__(
        self, invocation: WorkerInvocation, deadline: float, spec: RunSpec, registry: Registry
    ) -> None:
        self.invocation = invocation
        self._deadline = deadline
        self.spec = spec
        self._registry = registry
        self._team = Team(spec.prefix, invocation.slot)
        self._nonce = secrets.token_hex(8)
        self._place = ""
        self._expiring_at = deadline - min(EXPIRING_S, (deadline - time.monotonic()) / 3)
        self._said_expiring = False

    def live(self) -> str:
        self._build()
        key = self._team.worker(self.invocation.worker)
        self._voice = _Voice(self.invocation.store, key, self._nonce)
        self._voice.start()
        try:
            with BulkConnection(self.invocation.store) as store:
                return self._work(store)
        finally:
            self._voice.close()

    def _build(self) -> None:
        import_torch()
        from p2p.aggregate.parts import build
        from p2p.algorithm import probe
        from p2p.seeding import configure_determinism

        spec = self.spec
        spec.check_versions()
        configure_determinism(spec.threads)
        if job_digest(spec.job) != spec.job_digest:
            raise Refused(f"{spec.job} has changed since run {spec.run} was created")
        self._built = build(spec)
        found = probe(self._built.state, self._built.algorithm)
        expected = self._registry.admit_hardware(found)
        if expected != found:
            raise Refused(f"a worker computes other bits than the run {spec.run}")

    def _work(self, store: BulkConnection) -> str:
        idle_since = time.monotonic()
        while True:
            now = time.monotonic()
            if self._voice.replaced:
                return "another one has its place"
            if now > self._deadline - LAST_MOMENT_S:
                return "its time is over"
            try:
                if now > self._expiring_at and not self._said_expiring:
                    self._tell(store, Result(expiring=self.invocation.worker))
                    self._said_expiring = True
                found = store.items("BLPOP", self._team.tasks, str(IDLE_S))
                if found:
                    self._do(store, Part.from_text(found[1]))
                    idle_since = time.monotonic()
            except (StoreUnavailable, StoreError):
                time.sleep(RETRY_S)  # it is restarted; or its lead hears the same from it
            if time.monotonic() - idle_since > IDLE_LIMIT_S:
                if self._is_over():
                    return "the run is over"
                idle_since = time.monotonic()

    def _is_over(self) -> bool:
        try:
            return self._registry.read().outcome is not None
        except MayflyError:
            return False

    def _do(self, store: BulkConnection, task: Part) -> None:
        self._voice.at(task.to_text())
        place = Place(task.place)
        if not self._go_to(store, place):
            return  # a step that is over
        try:
            vector = self._built.algorithm.contribution_at(
                task.step, task.part, self._voice.progress
            )
        except Exception as error:  # the task's own; others may do better
            from p2p.job import user_trace

            trace = user_trace(error, Path(self.spec.job))
            self._tell(store, Result(task.place, task.part, trace))
            return
        finally:
            self._voice.at("")
        try:
            store.push(place.contribution(task.part), vector)
        except StoreError as refusal:
            self._tell(store, Result(task.place, task.part, refused=str(refusal)))
            return
        if not store.execute("EXISTS", place.ready):  # the step is over, and nobody removes this
            store.execute("DEL", place.contribution(task.part))
            return
        self._tell(store, Result(task.place, task.part))

    def _go_to(self, store: BulkConnection, place: Place) -> bool:
        """Takes over the model of this place; False if it is not there any more."""
        if place.name == self._place:
            return True
        self._place = ""
        if not store.execute("EXISTS", place.ready):
            return False
        parameters, rest = self._built.memory()
        try:
            store.pull(place.parameters, parameters)
            if len(rest):
                store.pull(place.rest, rest)
        except StoreLost:  # whoever it was that removed a part of it: it is put there again
            store.execute("DEL", place.ready)
            return False
        self._place = place.name
        return True

    def _tell(self, store: BulkConnection, result: Result) -> None:
        store.execute("RPUSH", self._team.results, result.to_text())
