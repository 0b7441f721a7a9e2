"""Virtual time, and what peers live in: the network, the registry's server, the platform, a disk.

The rules of the registry are the real `Ledger`, those of reviving the real `Revival`. Everything
happens in the order of a heap of (time, number), so a schedule replays to the letter.
"""

from __future__ import annotations

import copy
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from chaos.faults import EVENTS_AFFECTED, Fault, Schedule
from chaos.invariants import Invariants
from chaos.simulated_peer import SimulatedPeer
from chaos.training import Reference, reference
from fault.ledger import Ledger
from fault.records import Peer, Timing, peer_name, slot_of
from launcher.revival import Revival

TIMING = Timing(
    lease_ttl_s=1.0,
    boot_window_s=2.0,
    grant_ttl_s=4.0,
    join_timeout_s=15.0,
    regrant_cap_s=2.0,
    unanswered_s=0.6,
    patience_s=1.5,
    handover_ack_s=0.8,
    deadline_slack_s=0.3,
)
LAUNCHER = "launcher"
REVIVER_S = 0.25
REGISTRY_TIMEOUT_S = 0.5
STANDS_STILL_S = 0.2
"""For so long a way on which nothing moves any more may seem to carry something."""
PROGRESS_SECONDS = 90.0
"""A run whose faults are over must be finished after this."""
Action = Callable[[], None]


@dataclass(order=True, slots=True)
class _Due:
    at: float
    number: int
    action: Action = field(compare=False)


class World:
    """One simulated run. `trace` takes lines when it is a list."""

    def __init__(self, schedule: Schedule, trace: list[str] | None = None) -> None:
        self.schedule = schedule
        self.trace = trace
        self.random = random.Random(schedule.seed ^ 0x5EED)
        self.timing = replace(
            TIMING,
            handover_margin_s=schedule.handover_margin_s,
            handover_stagger=schedule.handover_stagger,
        )
        self.reference: Reference = reference(
            schedule.collective,
            schedule.shards,
            schedule.steps,
            schedule.pieces,
            schedule.compress,
        )
        self.now = 0.0
        self.messages = 0
        self.underway: Counter[tuple[Peer, Peer]] = Counter()
        """How many messages with a payload are on their way from the one to the other, or are taken
        to be; and from anyone, under ""."""
        draw = random.Random(schedule.seed ^ 0x0DE5)
        self.sees_underway = draw.choice(["nothing", "each", "any"])
        """What peers see of that: nothing, as of what goes through ZeroMQ, each way, or, as of what
        a relay brings, only that anything comes to them."""
        self._heap: list[_Due] = []
        self._number = 0
        self.peers: dict[Peer, SimulatedPeer] = {}
        self.ledger = Ledger(self.timing, life="life-0")
        self._lives = 0
        self._old_ledger: Ledger | None = None
        self.registry_up = True
        self.durable: dict[int, set[int]] = {}
        """The shards whose pieces of a step's state are on the disk."""
        self.checkpoints: set[int] = set()
        self.active: list[Fault] = []
        self._events_to_lose = self._events_to_double = self._boots_to_crash = 0
        self._events_late: list[float] = []
        self._revival = Revival(self.timing)
        self._specless_since = float("inf")
        self.invariants = Invariants(self)
        self.quiet_at = max([fault.ends for fault in schedule.faults], default=0.0)

    # --- time -------------------------------------------------------------------------------

    def after(self, seconds: float, action: Action) -> None:
        self._number += 1
        heapq.heappush(self._heap, _Due(self.now + seconds, self._number, action))

    def run(self) -> None:
        """Raises Violation when something that must hold does not."""
        self._create()
        for fault in self.schedule.faults:
            self.after(fault.at, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
            if fault.kind == "registry-older":
                self.after(max(0.0, fault.at - 1.0), self._remember_ledger)
        self.after(REVIVER_S, self._revive)
        heap, pop = self._heap, heapq.heappop
        until = self.quiet_at + PROGRESS_SECONDS
        while heap:
            due = pop(heap)
            self.now = due.at
            if self.now > until:
                self.invariants.no_progress()
            due.action()
            if self.ledger.outcome is not None and not any(
                peer.alive for peer in self.peers.values()
            ):
                break
        self.invariants.at_the_end()

    def tell(self, who: str, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:8.3f}  {who:<14} {text}")

    def new_id(self) -> str:
        return f"{self.random.getrandbits(48):012x}"

    def is_active(self, kind: str, slot: int) -> bool:
        return any(f.kind == kind and (not f.slots or slot in f.slots) for f in self.active)

    # --- the network ------------------------------------------------------------------------

    def send(self, source: Peer, to: Peer, message: Any) -> None:
        self.messages += 1
        target = self.peers.get(to)
        if target is None or not target.alive:
            return
        delay = 0.001 + 0.002 * self.random.random()
        delays = [delay]
        if self.active:
            delays = self._on_the_way(slot_of(source), slot_of(to), delay)
        is_seen = self.sees_underway != "nothing" and hasattr(message, "payload")
        if is_seen and not delays:
            self._show_underway((source, to), STANDS_STILL_S)
        for each in reversed(delays):
            if is_seen:
                self._show_underway((source, to), each)
            self._deliver(target, source, message, each)

    def _show_underway(self, way: tuple[Peer, Peer], seconds: float) -> None:
        ways = (way, ("", way[1]))
        self.underway.update(ways)
        self.after(seconds, lambda: self.underway.subtract(ways))

    def _deliver(self, target: SimulatedPeer, source: Peer, message: Any, delay: float) -> None:
        self.after(delay, lambda: target.receive(source, message))

    def _on_the_way(self, source: int, to: int, delay: float) -> list[float]:
        """The delays of the copies that arrive; a damaged one counts as lost, by its checksum."""
        draw, delays = self.random, [delay]
        for fault in self.active:
            match fault.kind:
                case "relay-down":
                    return []
                case "cut" if fault.slots == (source, to):
                    return []
                case "partition" if (source in fault.slots) != (to in fault.slots):
                    return []
                case "loss" if draw.random() < fault.amount:
                    return []
                case "double" if draw.random() < fault.amount:
                    delays.append(delay + draw.random() * 0.3)
                case "late":
                    delays = [each + draw.random() * fault.amount for each in delays]
        return delays

    # --- the registry -----------------------------------------------------------------------

    def ask(
        self,
        slot: int,
        question: Callable[[Ledger, float], Any],
        answer: Callable[[Any], None],
        failed: Action,
    ) -> None:
        """One call of the registry by a slot's peer; it takes a few milliseconds each way."""
        if not self.registry_up or self.is_active("registry-cut", slot):
            self.after(REGISTRY_TIMEOUT_S * self.random.uniform(0.2, 1.0), failed)
            return

        def arrive() -> None:
            if not self.registry_up:
                self.after(REGISTRY_TIMEOUT_S, failed)
                return
            before = self.ledger.view
            result = question(self.ledger, self.now)
            if self.ledger.view is not before:
                self.invariants.on_view(before)
            if self.is_active("answers-lost", slot):
                self.after(REGISTRY_TIMEOUT_S, failed)
            else:
                self.after(0.001 + 0.002 * self.random.random(), lambda: answer(result))

        self.after(0.001 + 0.002 * self.random.random(), arrive)

    def _remember_ledger(self) -> None:
        self._old_ledger = copy.deepcopy(self.ledger)

    def _stop_registry(self, fault: Fault) -> None:
        self.registry_up = False
        self.after(fault.lasts, lambda: self._start_registry(fault.kind))

    def _start_registry(self, kind: str) -> None:
        self.registry_up = True
        self._lives += 1
        if kind == "registry-empty":
            self.ledger = Ledger(self.timing)
        elif kind == "registry-older" and self._old_ledger is not None:
            self.ledger = self._old_ledger
        self.ledger.life = f"life-{self._lives}"
        if kind != "registry-down":
            self.invariants.registry_lost_something()
        self.tell("registry", f"up again ({kind}), as {self.ledger.life}")

    # --- the platform -----------------------------------------------------------------------

    def _create(self) -> None:
        self.ledger.create("spec", self.schedule.peers)
        for slot in range(self.schedule.peers):
            token = self.new_id()
            self.ledger.grant(slot, 1, token, LAUNCHER, self.now)
            self.invoke(slot, 1, token, "")

    def invoke(self, slot: int, generation: int, token: str, predecessor: Peer) -> None:
        delays = [0.02 + 0.05 * self.random.random()]
        if self._events_to_lose:
            self._events_to_lose -= 1
            self.tell("platform", f"lost the event for {slot}.{generation}")
            return
        if self._events_to_double:
            self._events_to_double -= 1
            delays.append(delays[0] + self.random.random() * 2.0)
        if self._events_late:
            delays = [delay + self._events_late.pop() for delay in delays[:1]]
        for delay in delays:
            self.after(delay, lambda: self._start(slot, generation, token, predecessor))

    def _start(self, slot: int, generation: int, token: str, predecessor: Peer) -> None:
        me = peer_name(slot, generation, f"{self.random.getrandbits(24):06x}")
        crashes = False
        if self._boots_to_crash:
            self._boots_to_crash -= 1
            crashes = True
        self.invariants.on_start(me)
        peer = SimulatedPeer(self, me, predecessor, self.schedule.time_limit_s)
        self.peers[me] = peer
        peer.claim(token, crashes)

    # --- the launcher's watch ---------------------------------------------------------------

    def _revive(self) -> None:
        self.after(REVIVER_S, self._revive)
        if not self.registry_up:
            self._revival.outage()
            return
        ledger = self.ledger
        if not ledger.spec:
            # nobody is left who knows the run: whoever resumes it creates it anew
            self._specless_since = min(self._specless_since, self.now)
            if self.now - self._specless_since > 6.0:
                ledger.create("spec", self.schedule.peers)
            return
        self._specless_since = float("inf")
        for slot, generation in self._revival.slots_to_grant(ledger.read(self.now), self.now):
            token = self.new_id()
            if ledger.grant(slot, generation, token, LAUNCHER, self.now):
                self.tell(LAUNCHER, f"grants {slot}.{generation}: no member is left")
                self.invoke(slot, generation, token, "")

    # --- faults -----------------------------------------------------------------------------

    def in_slots(self, slots: tuple[int, ...]) -> list[SimulatedPeer]:
        return [peer for peer in self.peers.values() if peer.alive and peer.slot in slots]

    def _strike(self, fault: Fault) -> None:
        self.tell("FAULT", str(fault))
        match fault.kind:
            case "crash":
                for peer in self.in_slots(fault.slots):
                    peer.die("crashed")
            case "crash-member" | "crash-successor":
                role = "member" if fault.kind == "crash-member" else "candidate"
                for peer in self.in_slots(fault.slots):
                    if peer.core.membership.role == role:
                        peer.die(f"crashed as a {role}")
            case "hang":
                for peer in self.in_slots(fault.slots):
                    peer.hung = True
            case "pause":
                for peer in self.in_slots(fault.slots):
                    peer.pause(fault.lasts)
            case "registry-down" | "registry-older" | "registry-empty":
                if self.registry_up:
                    self._stop_registry(fault)
            case "event-lost":
                self._events_to_lose = EVENTS_AFFECTED
            case "event-doubled":
                self._events_to_double = EVENTS_AFFECTED
            case "event-late":
                self._events_late = [fault.amount] * EVENTS_AFFECTED
            case "boot-crash":
                self._boots_to_crash = EVENTS_AFFECTED
            case "scale":
                self.ledger.scale(int(fault.amount))
            case _:
                self.active.append(fault)
                self.after(fault.lasts, lambda: self._end(fault))

    def _end(self, fault: Fault) -> None:
        self.active.remove(fault)
        self.tell("FAULT", f"over: {fault.kind}")
