"""Evaluation beside the training: a state goes out, a function judges it, an event comes back.

At the end of an epoch the players of two shards put a copy of the state into the run's storage; the
first of them invokes a function of its own kind, which evaluates it, in a process where nothing of
the training is. So an evaluation never waits for a step, nor a step for it, and it cannot disturb a
generator that a contribution draws from. The function says its result as an event, once; should it
die, the platform delivers its event again, and the state is still there.

The state of the last step is evaluated in the same way; the run does not wait for it to be over.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from checkpoint import Storage, open_storage
from fault.errors import MayflyError
from fault.records import Timing
from fault.registry import Registry
from p2p.spec import RunSpec, job_digest
from p2p.state import TrainingState
from p2p.task import Task

WAITING_LIMIT = 2
"""Copies of the state that wait to be stored; where storing takes longer, epochs are left out."""
REGISTRY_TIMEOUT_S = 10.0


def state_name(step: int) -> str:
    """The object that holds the state to be evaluated."""
    return f"evaluations/{step:012d}"


class Announcer(Protocol):
    """What `StateSender` needs of the peer it belongs to; called on the sender's thread."""

    def record_once(self, kind: str, key: str, fields: dict[str, object]) -> bool: ...
    def evaluate(self, step: int) -> None: ...
    def warn(self, text: str) -> None: ...


class StateSender:
    """Stores states to be evaluated, on a thread of its own, and has them evaluated."""

    def __init__(self, storage: Storage, peer: Announcer) -> None:
        self._storage = storage
        self._peer = peer
        self._queue: queue.Queue[tuple[int, memoryview] | None] = queue.Queue(WAITING_LIMIT)
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)
        self._thread.start()

    def submit(self, step: int, copy: Callable[[], memoryview]) -> bool:
        """False, and nothing is copied, when too many wait already."""
        if self._queue.full():
            return False
        self._queue.put((step, copy()))
        return True

    def close(self, seconds: float) -> None:
        """Waits for what is under way, but not for long: somebody else may do it."""
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _run(self) -> None:
        while (waiting := self._queue.get()) is not None:
            self.send(*waiting)

    def send(self, step: int, image: memoryview) -> None:
        """Stores the state and has it evaluated, on the caller's thread."""
        try:
            self._storage.put(state_name(step), [image])
        except MayflyError as error:
            self._peer.warn(f"the state of step {step} cannot be evaluated: {error}")
            return
        if self._peer.record_once("evaluation", str(step), {"step": step}):
            self._peer.evaluate(step)


# --- the function ------------------------------------------------------------------------------


@dataclass(slots=True)
class Evaluator:
    """What a function process keeps between its invocations: the task of one run."""

    _run: str = ""
    _built: tuple[Task, TrainingState] | None = field(default=None)

    def evaluate(self, run: str, registry_url: str, step: int) -> dict[str, Any]:
        """Evaluates the state of `step` and says the result; what is not there was done before.

        Raises what keeps the platform from being told that it is done: it will deliver again.
        """
        registry = Registry(registry_url, run, Timing(), REGISTRY_TIMEOUT_S)
        try:
            text = registry.spec()
            if not text:
                return {"step": step, "reason": f"there is no run {run}"}
            spec = RunSpec.from_json(text)
            storage = open_storage(spec.checkpoints)
            image = storage.get(state_name(step))
            if image is None:
                return {"step": step, "reason": "there is no state of this step"}
            metrics, warning = self._metrics(spec, image)
            fields = {"step": step, "epoch": step / spec.evaluate_every, "values": metrics}
            if warning:
                registry.event("warning", f"evaluation {step}", {"text": warning})
            registry.event("metrics", str(step), fields)
            storage.delete_object(state_name(step))
            return {"step": step, "metrics": metrics}
        finally:
            registry.close()

    def _metrics(self, spec: RunSpec, image: bytes) -> tuple[dict[str, float], str]:
        from p2p.job import user_trace

        task, state = self._task(spec)
        state.load(image)
        try:
            return state.evaluate(task), ""
        except Exception as error:  # the task's own, and it would raise the same again
            trace = user_trace(error, Path(spec.job))
            return {}, f"evaluate() raised: {trace}"

    def _task(self, spec: RunSpec) -> tuple[Task, TrainingState]:
        from p2p.job import load_task
        from p2p.seeding import configure_determinism

        if self._built is None or self._run != spec.run:
            configure_determinism(spec.threads)
            spec.check_versions()
            if job_digest(spec.job) != spec.job_digest:
                raise MayflyError(f"{spec.job} has changed since run {spec.run} was created")
            task = load_task(Path(spec.job), dict(spec.settings))
            self._run, self._built = spec.run, (task, TrainingState(task))
        return self._built
