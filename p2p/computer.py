"""What a peer does in its computing thread: everything that touches torch, one job after another.

A job is one of the core's actions; its answer goes back through `post`, as a call of one of the
core's methods. Since jobs run in the order in which the core asked, an image is always of a state
at a step boundary.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from checkpoint import AsyncWriter, Storage, Written, open_storage, read
from fault import actions
from fault.errors import Refused, StoreError
from fault.records import Outcome, Peer, slot_of
from p2p.actions import Apply, Compute, Evaluate, LoadState, TakeImage, WritePieces
from p2p.aggregate.parts import build
from p2p.algorithm import Algorithm, probe
from p2p.collectives.memory import Memory, Vector
from p2p.collectives.rounding import IS_COMPILED
from p2p.core import Core
from p2p.evaluation import StateSender
from p2p.final import write_final
from p2p.job import user_trace
from p2p.seeding import configure_determinism
from p2p.spec import RunSpec, job_digest
from p2p.state import digest_of

if TYPE_CHECKING:
    from p2p.aggregate.averaging import DatabaseAveraging

Call = Callable[[Core, float], None]


class Surroundings(Protocol):
    """What the computer needs of the peer it belongs to. Called from several threads."""

    @property
    def memory(self) -> Memory: ...

    def post(self, call: Call) -> None: ...
    def stepped(self, step: int, loss: float) -> None: ...
    def record_once(self, kind: str, key: str, fields: dict[str, object]) -> bool: ...
    def checkpointed(self, step: int) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...
    def evaluate(self, step: int) -> None: ...
    def call_worker(self, worker: int) -> None: ...
    def warn(self, text: str) -> None: ...


class Computer:
    """The task, its state, and the thread that runs `work`."""

    def __init__(self, me: Peer, spec: RunSpec, peer: Surroundings) -> None:
        self.me = me
        self.spec = spec
        self.peer = peer
        self.progress = 0
        """Grows while work goes on; stands still when the computing thread does."""
        self.busy = False
        """Whether the thread is doing something that should get on."""
        self.jobs: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._kills = {step for slot, step in spec.kills if slot == slot_of(me)}
        self._storage: Storage = open_storage(spec.checkpoints)
        self._writer = AsyncWriter(
            self._storage, spec.shards, spec.keep_checkpoints, self._on_written
        )
        self._written: tuple[int, tuple[int, ...]] = (-1, ())
        self._sender = StateSender(self._storage, peer) if spec.evaluate_every else None
        self._database: DatabaseAveraging | None = None
        self._load_failed = False

    def build(self) -> str:
        """Loads the task and computes the probe that tells whether this process fits the run.

        Raises Refused for another job file than the run's, and all that `load_task` raises.
        """
        spec = self.spec
        configure_determinism(spec.threads)
        job = Path(spec.job)
        if job_digest(job) != spec.job_digest:
            raise Refused(f"{job} has changed since run {spec.run} was created")
        if spec.compress == "int8" and not IS_COMPILED:
            self.peer.warn(
                "the arithmetic of int8 was not compiled when Mayfly was installed here, for want "
                "of a C compiler: the bits are the same, and take longer"
            )
        built = build(spec)
        self.task, self.state = built.task, built.state
        self.algorithm: Algorithm = built.algorithm
        built.algorithm.memory = self.peer.memory
        probed = probe(self.state, self.algorithm, self._on_progress)
        if spec.aggregate == "database":
            from p2p.aggregate.averaging import DatabaseAveraging

            self._database = DatabaseAveraging(
                spec, slot_of(self.me), built, self.peer.call_worker, self.peer.warn
            )
            self.algorithm = self._database
        # what was built lives to the end; collecting it again and again would cost every step
        gc.collect()
        gc.freeze()
        return probed

    def work(self) -> None:
        """Does jobs until there is a None."""
        handlers: dict[type, Callable[[object], None]] = {
            Compute: self._compute,
            Apply: self._apply,
            TakeImage: self._take_image,
            LoadState: self._load_state,
            actions.LoadCheckpoint: self._load_checkpoint,
            WritePieces: self._write_pieces,
            Evaluate: self._evaluate,
            actions.Finish: self._finish,
        }
        while (job := self.jobs.get()) is not None:
            self.busy = True
            self.progress += 1
            try:
                handlers[type(job)](job)
            except StoreError as error:  # it refuses everyone
                self._fail("StoreError", self.state.step, str(error))
            except MemoryError:
                self.peer.post(lambda core, now: core.on_raised("out of memory"))
            except Exception as error:  # the task's own, for the most part
                self._on_raised(job, error)
            self.busy = False

    def _on_raised(self, job: object, error: Exception) -> None:
        trace = getattr(error, "trace", "") or user_trace(error, Path(self.spec.job))
        if "  File " not in trace:  # none of it is of the user's own files
            trace = traceback.format_exc()
        if not isinstance(job, Apply):
            self.peer.post(lambda core, now: core.on_raised(trace))  # others may do better
            return
        # every peer applies the same mean to the same state, so every peer would raise the same
        summary = traceback.format_exception_only(error)[-1].strip()
        reason = f"the optimizer or scheduler raised at step {job.step}: {summary}"
        self._fail("RunFailed", job.step, reason, trace)

    def _fail(self, error: str, step: int, reason: str, trace: str = "") -> None:
        outcome = Outcome("failed", step, "", error, reason, trace)
        self.peer.post(lambda core, now: core.fail(outcome, now))

    def close(self) -> None:
        """The process may live on, for another invocation: nothing of this one is to stay."""
        if self._sender is not None:
            self._sender.close(1.0)
        self._writer.close(5.0)
        gc.unfreeze()

    # --- jobs -------------------------------------------------------------------------------

    def _on_progress(self) -> None:
        self.progress += 1

    def _compute(self, job: object) -> None:
        assert isinstance(job, Compute)
        self._on_progress()
        if job.step != self.state.step:
            return  # a newer state came in between
        if job.step in self._kills:
            self._kill_once(job.step)
        step, shard = job.step, job.shard

        def on_part(vector: Vector, start: int, stop: int) -> None:
            self.peer.post(lambda core, now: core.on_part(step, shard, vector, start, stop, now))

        overlapped = on_part if self.spec.overlap else None
        vector = self.algorithm.contribution(job.shard, self._on_progress, overlapped)
        self.peer.post(lambda core, now: core.on_contribution(step, shard, vector, now))

    def _kill_once(self, step: int) -> None:
        slot = slot_of(self.me)
        self._kills.discard(step)
        fields: dict[str, object] = {"slot": slot, "step": step, "peer": self.me}
        if self.peer.record_once("killed", f"{slot}@{step}", fields):
            os.kill(os.getpid(), signal.SIGKILL)

    def _apply(self, job: object) -> None:
        assert isinstance(job, Apply)
        self._on_progress()
        if job.step != self.state.step:
            return
        loss = self.algorithm.loss(job.mean)
        if not np.isfinite(loss):
            self.peer.post(lambda core, now: core.on_not_finite(job.step, loss, now))
            return
        self.algorithm.apply(job.mean, self._on_progress)
        step, digest = self.state.step, self.state.digest()
        self.peer.post(lambda core, now: core.on_applied(step, digest, now))
        self.peer.stepped(step, loss)

    def _take_image(self, job: object) -> None:
        step, digest = self.state.step, self.state.digest()
        outline = self._database.outline() if self._database is not None else None
        image = memoryview(outline) if outline is not None else self.state.image()
        self.peer.post(lambda core, now: core.on_image(step, digest, image, now))

    def _load_state(self, job: object) -> None:
        assert isinstance(job, LoadState)
        image = job.image
        if self._database is not None:
            image = self._database.whole(image, job.digest)
        if digest_of(image) != job.digest:
            if not self._load_failed:  # it is tried again at each beat
                lack = "damaged" if image else "not in the store"
                self.peer.warn(
                    f"the state of step {job.step} that was sent is {lack}; asking again"
                )
            self._load_failed = True
            self.peer.post(lambda core, now: core.on_load_failed())
            return
        self._load_failed = False
        # from here on, what goes wrong ends this peer: its state may be half replaced
        self.state.load(image)
        self._post_loaded()

    def _load_checkpoint(self, job: object) -> None:
        restored = read(self._storage, lambda damage: self.peer.warn(str(damage)))
        if restored is not None and restored.step > self.state.step:
            self.state.load(restored.image)
        self._post_loaded()

    def _post_loaded(self) -> None:
        step, digest = self.state.step, self.state.digest()
        self.peer.post(lambda core, now: core.on_loaded(step, digest, now))

    # --- checkpoints ------------------------------------------------------------------------

    def _write_pieces(self, job: object) -> None:
        assert isinstance(job, WritePieces)
        if job.step != self.state.step:
            return
        if self._written == (job.step, job.shards):
            # written: what is left is to see whether the others' pieces are there
            self._writer.submit(job.step, self.state.digest(), b"", ())
        elif self._writer.submit(job.step, self.state.digest(), self.state.image(), job.shards):
            self._written = (job.step, job.shards)

    def _on_written(self, written: Written) -> None:
        """Called on the writer's thread."""
        if written.error is not None:
            self._written = (-1, ())
            self.peer.warn(f"the checkpoint of step {written.step} failed: {written.error}")
        if written.durable:
            self.peer.checkpointed(written.step)
            self.peer.post(lambda core, now: core.on_durable(written.step))

    def _evaluate(self, job: object) -> None:
        assert isinstance(job, Evaluate) and self._sender is not None
        if job.step == self.state.step and not self._sender.submit(job.step, self.state.image):
            self.peer.warn(f"step {job.step} is not evaluated: the ones before are not stored yet")

    def _finish(self, job: object) -> None:
        """The last step's checkpoint is durable: leave the weights behind, and have them evaluated.

        Not here: an evaluation may take longer than this function has to live, and the next one.
        """
        assert isinstance(job, actions.Finish)
        write_final(Path(self.spec.folder), self.state.named_tensors())
        if self._sender is not None:
            self._sender.send(job.outcome.step, self.state.image())
        self.peer.finished(job.outcome)
