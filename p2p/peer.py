"""One invocation's life: claim the grant, join, take part in the steps, leave.

Three threads share the work. The caller's thread computes (`computer.py`); one drives the core,
with the link to the relays, so heartbeats never wait for a computation; one speaks with the
registry (`registrar.py`). All decisions are the core's.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import zmq

from fault import actions
from fault.errors import MayflyError, Refused, RegistryUnavailable
from fault.records import Contact, Outcome, Peer, Timing, peer_name
from fault.registry import Registry
from p2p.actions import Send
from p2p.aggregate.places import WorkerInvocation
from p2p.boot import BootWatch
from p2p.core import Core
from p2p.importing import import_torch
from p2p.invocation import Invocation, evaluation_payload
from p2p.messages import KINDS, Ask, Beat, Hello, Message, Segment, StatePart, Total, ViewIs
from p2p.registrar import Registrar
from p2p.spec import RunSpec
from p2p.steps import Shape
from p2p.traffic import Traffic
from p2p.transport.allocation import keep_large_blocks
from p2p.transport.direct import DirectLinks
from p2p.transport.keys import PeerKeys
from p2p.transport.link import ControlAndBulk, relay_bulk, relayed
from p2p.transport.shared import Gone, Pool
from p2p.transport.underway import LinksUnderway
from p2p.transport.watch import Watch
from p2p.transport.wire import Malformed, WireFormat

BULK = (Segment, Total, StatePart)
TRAFFIC_EVERY_S = 5.0
ADDRESS_VARIABLE = "MAYFLY_ADDRESS"
"""Of this machine, at which other peers reach it; for `--links direct`."""
BATCH_MESSAGES = 64
"""Taken in at once before the core's actions are carried out."""
CLAIM_SECONDS = 10.0
FAREWELL_SECONDS = 3.0
LAST_WORDS_MS = 200
BOOT_REGISTRY_TIMEOUT_S = 2.0

Call = Callable[[Core, float], None]


def live(invocation: Invocation, invoke: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Lives one invocation to its end; says how it ended.

    `invoke` starts another function of the run with the event it is given. An event that was
    delivered twice, or too late, finds its grant taken and ends at once.
    """
    me = peer_name(invocation.slot, invocation.generation, secrets.token_hex(4))
    keep_large_blocks()
    bare = Registry(invocation.registry, invocation.run, Timing(), BOOT_REGISTRY_TIMEOUT_S)
    bare.wait_until_up(CLAIM_SECONDS)
    text = bare.spec()
    if not text:
        return {"peer": me, "reason": f"there is no run {invocation.run}"}
    spec = RunSpec.from_json(text)
    bare.close()
    registry = Registry(invocation.registry, invocation.run, spec.timing)
    if not registry.claim(invocation.slot, invocation.generation, invocation.token, me):
        registry.close()
        return {"peer": me, "reason": "the grant is taken, replaced or expired"}
    return _Peer(me, invocation, spec, text, registry, invoke).live()


class _Peer:
    """The threads of one invocation and what passes between them."""

    def __init__(
        self,
        me: Peer,
        invocation: Invocation,
        spec: RunSpec,
        spec_text: str,
        registry: Registry,
        invoke: Callable[[dict[str, Any]], None],
    ) -> None:
        self.me = me
        self.invocation = invocation
        self.spec = spec
        self._keys: PeerKeys | None = None
        self.core: Core | None = None
        self._inbox: deque[Call] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._wire: WireFormat[Message] = WireFormat(KINDS)
        self.memory = Pool()
        self._traffic = Traffic()
        self._members: tuple[Peer, ...] = ()
        self._registrar = Registrar(
            me, registry, spec_text, spec.timing, self.post, invocation.another, invoke
        )
        self._exit: actions.Exit | None = None
        self._finishing = False
        self._left = threading.Event()
        self._computer: Any = None
        self._built = threading.Event()
        self._boot_watch = BootWatch()
        self._progress_seen = (-1, 0.0)
        self._watched_at = 0.0

    # --- what other threads call ------------------------------------------------------------

    def post(self, call: Call) -> None:
        self._inbox.append(call)
        try:
            os.write(self._wake_writer, b"\0")
        except BlockingIOError:
            pass  # it is going to wake up anyway
        except OSError:
            if self._exit is None:
                raise

    def stepped(self, step: int, loss: float) -> None:
        self._registrar.stepped(step, loss)

    def checkpointed(self, step: int) -> None:
        self._registrar.checkpointed(step)

    def finished(self, outcome: Outcome) -> None:
        self._registrar.finish(outcome)

    def evaluate(self, step: int) -> None:
        self._registrar.invoke(evaluation_payload(self.spec.run, self.invocation.registry, step))

    def call_worker(self, worker: int) -> None:
        """Has a worker started, for this slot."""
        slot, spec = self.invocation.slot, self.spec
        invocation = WorkerInvocation(
            spec.run, self.invocation.registry, spec.store_of(slot), slot, worker
        )
        self._registrar.invoke(asdict(invocation))

    def warn(self, text: str) -> None:
        print(f"{self.me}: {text}", file=sys.stderr, flush=True)
        self._registrar.event("warning", f"{self.me} {text[:200]}", {"text": text})

    def record_once(self, kind: str, key: str, fields: Mapping[str, Any]) -> bool:
        """Records an event now; False when another peer did so before, or the registry is away."""
        registry = Registry(self.invocation.registry, self.spec.run, self.spec.timing)
        try:
            return registry.event(kind, key, fields)
        except RegistryUnavailable:
            return False
        finally:
            registry.close()

    # --- the computing thread ---------------------------------------------------------------

    def live(self) -> dict[str, Any]:
        self._registrar.start()
        start = {"peer": self.me, "start": self.invocation.start}
        self._registrar.event("started", self.me, start)
        keeping = threading.Thread(target=self._keep_the_lease, name="boot", daemon=True)
        keeping.start()
        import_torch()  # which takes longer than a lease
        from p2p.computer import Computer

        driver = threading.Thread(target=self._drive, name="core", daemon=True)
        self._computer = computer = Computer(self.me, self.spec, self)
        try:
            self.spec.check_versions()
            if self.spec.is_on_tcp:
                self._keys = PeerKeys.of_this_process()
            probe = computer.build()
            self._admit(probe)
        except MayflyError as error:
            return self._give_up(error)
        self._lengths = computer.algorithm.length, computer.algorithm.gradient_length
        self._built.set()
        keeping.join()
        driver.start()
        computer.work()
        cause = self._exit.cause if self._exit is not None else ""
        reason = self._exit.reason if self._exit is not None else "?"
        last = self.core.contact(time.monotonic()) if self.core is not None and cause else None
        self._registrar.leave(cause, FAREWELL_SECONDS, last)
        computer.close()  # which may have had a state evaluated at the last moment
        self._registrar.close(FAREWELL_SECONDS)
        self._left.set()
        driver.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        self.memory.close()
        return {"peer": self.me, "reason": reason, "step": computer.state.step}

    def _keep_the_lease(self) -> None:
        """While the task is being built there is no core yet, only a claim to keep."""
        watch = self._boot_watch
        while not self._built.wait(self.spec.timing.beat_s):
            self._registrar.contact(Contact(self.me))
            while self._inbox:
                self._inbox.popleft()(watch, time.monotonic())  # type: ignore[arg-type]

    def _admit(self, probe: str) -> None:
        registry = Registry(self.invocation.registry, self.spec.run, self.spec.timing)
        registry.wait_until_up(CLAIM_SECONDS)
        try:
            expected = registry.admit_hardware(probe)
        finally:
            registry.close()
        if expected != probe:
            raise Refused(
                f"{self.me} computes other bits than the run {self.spec.run}: its probe of the "
                f"task is {probe}, the run's is {expected}; it runs on another kind of processor, "
                "or the task is not deterministic"
            )

    def _give_up(self, error: MayflyError) -> dict[str, Any]:
        """The task cannot be built here; the launcher counts such boots apart from deaths."""
        self._built.set()
        fields = {
            "peer": self.me,
            "error": type(error).__name__,
            "reason": str(error),
            "trace": getattr(error, "trace", ""),
        }
        self._registrar.event("boot_failed", self.me, fields)
        self._registrar.leave("", FAREWELL_SECONDS)
        self._computer.close()
        self._registrar.close(FAREWELL_SECONDS)
        return {"peer": self.me, "reason": str(error)}

    # --- the core's thread ------------------------------------------------------------------

    def _drive(self) -> None:
        try:
            self._loop()
        except BaseException:
            # without its core a peer is nothing; dying at once is what the others can handle
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def _loop(self) -> None:
        spec, timing = self.spec, self.spec.timing
        length, gradient_length = self._lengths
        shape = Shape.of(
            spec.collective,
            spec.compress,
            shards=spec.shards,
            steps=spec.steps,
            length=length,
            gradient_length=gradient_length,
            segment_bytes=spec.segment_bytes,
            seed=spec.seed,
            within_host=spec.is_within_host,
        )
        core = self.core = Core(
            self.me,
            shape,
            timing,
            lambda: secrets.token_hex(8),
            spec.checkpoint_every,
            spec.evaluate_every,
            self.invocation.predecessor,
            self.invocation.deadline,
            self.memory,
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = ControlAndBulk(self.me.encode(), spec.relays, context, self._keys)
        watch = Watch()
        watch.register(self._wake_reader, zmq.POLLIN)
        binds = spec.listens_at(self.me, os.environ.get(ADDRESS_VARIABLE, "127.0.0.1"))
        self._direct = DirectLinks(
            self.me,
            binds,
            context,
            watch,
            self._wire,
            self.memory,
            self._traffic,
            self._keys,
            core.steps.place,
        )
        self._link.stream(watch, self._wire, core.steps.place)
        core.steps.underway = LinksUnderway(self._direct, self._link)
        core.begin(time.monotonic())
        booting = self._boot_watch
        core.membership.began_memberless(booting.memberless_since, booting.life, time.monotonic())
        next_tick = told_at = time.monotonic()
        while self._exit is None:
            wait_ms = max(0, int((next_tick - time.monotonic()) * 1000) + 1)
            watch.poll(wait_ms)
            self._take_in(core, watch)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = max(next_tick + timing.beat_s, now)
                core.steps.progress = self._computer.progress
                self._link.tick(now)
                self._direct.tick(now)
                core.tick(now)
                self._registrar.tell_steps(self._is_teller(core))
                if core.contact_is_due(now):
                    self._registrar.contact(core.contact(now))
                if now - told_at > TRAFFIC_EVERY_S:
                    told_at = now
                    self._tell_traffic(core)
                self._watch_own_thread(now)
            self._carry_out(core)
            self._keep_links(core)
        self._tell_traffic(core)
        self._direct.close()
        self._link.close(LAST_WORDS_MS)  # the view that a successor takes part in, for one
        context.term()
        self._computer.jobs.put(None)
        # a thread that is deep in a computation ends it first; one that hangs is not waited for
        if self._exit.blunt or not self._left.wait(timing.patience_s):
            os.kill(os.getpid(), signal.SIGKILL)

    def _tell_traffic(self, core: Core) -> None:
        self._traffic.waited_s = round(core.steps.waited_s, 3)
        counts = asdict(self._traffic)
        self._registrar.event(
            "traffic", f"{self.me}:{time.monotonic()}", {"peer": self.me, **counts}
        )

    def _keep_links(self, core: Core) -> None:
        view = core.membership.view
        if view is not None and view.members != self._members:
            self._members = view.members
            self._direct.keep(view.members)

    def _is_teller(self, core: Core) -> bool:
        view = core.membership.view
        return view is not None and view.members[0] == self.me

    def _take_in(self, core: Core, watch: Watch) -> None:
        if watch.is_readable(self._wake_reader):
            os.read(self._wake_reader, 4096)
            watch.found_empty(self._wake_reader)
        while self._inbox:
            self._inbox.popleft()(core, time.monotonic())
            self._carry_out(core)
        self._direct.flush()
        for _ in range(BATCH_MESSAGES):
            if watch.is_exhausted and not (self._direct.has_come or self._link.has_come):
                return  # to look through all the ways would find nothing
            now = time.monotonic()
            try:
                received = self._received(now)
            except Gone:
                continue  # it is counted, and asked for again
            except Malformed as error:
                self._on_malformed(error)
                continue
            if received is None:
                return
            self._traffic.received += 1
            core.on_message(*received, now)
            self._carry_out(core)
        self.post(lambda core, now: None)  # there is more: come back without waiting

    def _on_malformed(self, error: Malformed) -> None:
        count = self._traffic.malformed = self._traffic.malformed + 1
        if count & (count - 1) == 0:  # the first, and ever fewer: whoever sends garbage sends much
            said = f"{self.me}: dropped a message, {count} so far: {error}"
            print(said, file=sys.stderr, flush=True)

    def _received(self, now: float) -> tuple[Peer, Message] | None:
        """A message for the core, by whichever way it came, or None. Raises Malformed."""
        if self._direct.has_all and not self._link.has_come:
            return self._direct.receive()
        while (came := relayed(self._link, self._wire)) is not None:
            source, message = came
            if isinstance(message, Hello):
                self._direct.on_hello(source, message, now)
                continue
            is_for_links = isinstance(message, BULK) or (
                isinstance(message, Beat) and self._direct.is_local
            )
            if is_for_links and (hello := self._direct.hello(source, now)):
                self._link.send_control(source.encode(), self._wire.encode(hello))
            return source, message
        return self._direct.receive()

    def _carry_out(self, core: Core) -> None:
        index = 0
        while index < len(core.out):  # an action may bring about others
            self._act(core, core.out[index])
            index += 1
        core.out.clear()

    def _act(self, core: Core, action: object) -> None:
        match action:
            case Send():
                self._send(action.to, action.message, action.again)
            case actions.PushView():
                for peer in action.to:
                    self._send(peer, ViewIs(action.view))
            case actions.Propose() | actions.GrantSlot():
                self._registrar.decide(action)
            case actions.ContactNow():
                self._registrar.contact(core.contact(time.monotonic()))
            case actions.Finish():
                if action.outcome.state != "finished":
                    self._registrar.finish(action.outcome)
                elif not self._finishing:
                    self._finishing = True
                    self._computer.jobs.put(action)
            case actions.Exit():
                self._exit = self._exit or action
            case _:
                self._computer.jobs.put(action)

    def _send(self, to: Peer, message: Message, again: bool = False) -> None:
        traffic = self._traffic
        if not isinstance(message, BULK):
            traffic.asks += isinstance(message, Ask)
            if isinstance(message, Beat) and self._direct.send_at_once(to, message):
                return  # which spares the relay, and both of its threads' wakes
            traffic.relays(0, self._link.send_control(to.encode(), self._wire.encode(message)))
            return
        if again:
            traffic.again += 1
            self._direct.check(to, time.monotonic())
        elif self._direct.send(to, message):
            return
        traffic.relays(len(message.payload), relay_bulk(self._link, self._wire, to, message))

    def _watch_own_thread(self, now: float) -> None:
        """Ends this process when its computing thread stands still for longer than anyone waits."""
        progress = self._computer.progress
        # a process that stood still as a whole is no sign of a thread that does
        stopped = now - self._watched_at > 10 * self.spec.timing.beat_s
        self._watched_at = now
        if progress != self._progress_seen[0] or not self._computer.busy or stopped:
            self._progress_seen = (progress, now)
        elif now - self._progress_seen[1] > 2 * self.spec.timing.patience_s:
            print(f"{self.me}: no progress, the watchdog ends this process", file=sys.stderr)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
