"""The thread that speaks with the registry, so that no step ever waits for it.

It makes contact whenever the core says so, and carries out what the core decided: proposals, grants
with the invocation they allow, events, the outcome. When the registry is away, the core is told,
and what must not be lost (events, the outcome, a departure) is said again until it is heard.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fault import actions
from fault.errors import MayflyError, PlatformUnavailable, RegistryUnavailable
from fault.records import Contact, Outcome, Peer, Snapshot, Timing
from fault.registry import Registry
from p2p.core import Core
from p2p.journal import Journal, Row

JOURNAL_EVERY_S = 0.25
"""Less than a calm member's contacts are apart."""
EVENTS_LIMIT = 1000

Call = Callable[[Core, float], None]


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    key: str
    fields: Mapping[str, Any]


class Registrar:
    """Owns one connection to the registry, and a second thread for invocations.

    `post` hands a call to the core; `payload(slot, generation, token, predecessor)` makes an
    invocation's event; `invoke` hands it to the platform and may take its time.
    """

    def __init__(
        self,
        me: Peer,
        registry: Registry,
        spec_text: str,
        timing: Timing,
        post: Callable[[Call], None],
        payload: Callable[[int, int, str, Peer], dict[str, Any]],
        invoke: Callable[[dict[str, Any]], None],
    ) -> None:
        self.me = me
        self.timing = timing
        self.journal = Journal()
        self.clock_ahead_s = 0.0
        """The registry's clock less this machine's."""
        self._registry = registry
        self._spec_text = spec_text
        self._post = post
        self._payload = payload
        self._hand_to_platform = invoke
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._contact: Contact | None = None
        self._decisions: deque[actions.Propose | actions.GrantSlot] = deque()
        self._events: deque[Event] = deque(maxlen=EVENTS_LIMIT)
        self._outcome: Outcome | None = None
        self._durable = -1
        self._granted: dict[str, actions.GrantSlot] = {}
        """Grants whose answer got lost, by token."""
        self._tells_steps = False
        self._told_at = 0.0
        self._departure: tuple[str, float] | None = None
        self._stop = False
        self._invocations: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)
        self._inviter = threading.Thread(target=self._invite, name="invocations", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._inviter.start()

    # --- from other threads -----------------------------------------------------------------

    def contact(self, contact: Contact) -> None:
        """The newest word of the core; it replaces one that was not sent yet."""
        with self._lock:
            self._contact = contact
        self._wake.set()

    def decide(self, action: actions.Propose | actions.GrantSlot) -> None:
        self._decisions.append(action)
        self._wake.set()

    def event(self, kind: str, key: str, fields: Mapping[str, Any]) -> None:
        self._events.append(Event(kind, key, fields))
        self._wake.set()

    def checkpointed(self, step: int) -> None:
        self._durable = max(self._durable, step)
        self._wake.set()

    def finish(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._wake.set()

    def invoke(self, payload: dict[str, Any]) -> None:
        """Hands this event to the platform as soon as it takes it."""
        self._invocations.put(payload)

    def tell_steps(self, mine: bool) -> None:
        """Whether this peer is the one that tells the steps."""
        self._tells_steps = mine

    def stepped(self, step: int, loss: float) -> None:
        self.journal.add(step, time.time() + self.clock_ahead_s, loss)

    def leave(self, cause: str, seconds: float, last: Contact | None = None) -> None:
        """Says goodbye, trying for a while. After that, invocations are all that is still done.

        `last` says what this peer was at when it ended of `cause`: the word of the last beat may
        be of an earlier step, and the registry keeps count of what peers end of.
        """
        with self._lock:
            self._contact = last
            self._departure = (cause, time.monotonic() + seconds)
        self._wake.set()
        self._thread.join(seconds + 5.0)

    def close(self, seconds: float) -> None:
        """Hands what was invoked to the platform, and ends the threads."""
        self._invocations.put(None)
        self._inviter.join(seconds)
        self._registry.close()

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            self._wake.wait(1.0)
            self._wake.clear()
            try:
                self._work()
            except RegistryUnavailable:
                self._post(lambda core, now: core.on_contact_failed(now))
                # not at once: a server that starts again needs the processor for itself
                time.sleep(self.timing.beat_s)
                if self._departure is not None:
                    self._stop = time.monotonic() > self._departure[1]
                    self._wake.set()

    def _work(self) -> None:
        registry = self._registry
        while self._decisions:
            self._carry_out(self._decisions.popleft())
        with self._lock:  # a departure that comes later waits, for its last word comes before it
            contact, departure = self._contact, self._departure
        if contact is not None:
            snapshot = registry.contact(contact)
            with self._lock:
                if self._contact is contact:  # said, and not before: the registry may be away
                    self._contact = None
            self.clock_ahead_s = snapshot.now - time.time()
            self._find_lost_grants(snapshot)
            self._post(lambda core, now: core.on_snapshot(snapshot, now))
        if self._durable >= 0:
            registry.checkpointed(self._durable)
            self._durable = -1
        while self._events:
            event = self._events[0]
            registry.event(event.kind, event.key, event.fields)
            self._events.popleft()
        self._tell_steps(registry)
        if self._outcome is not None:
            registry.finish(self._outcome)
            self._outcome = None
            self._post(lambda core, now: core.out.append(actions.ContactNow()))
        if departure is not None:
            registry.leave(self.me, departure[0])
            self._stop = True

    def _tell_steps(self, registry: Registry) -> None:
        now = time.monotonic()
        ending = self._outcome is not None or self._departure is not None
        if now - self._told_at < JOURNAL_EVERY_S and not ending:
            return
        self._told_at = now
        rows: list[Row] = self.journal.untold(self._tells_steps)
        if rows:
            registry.event("steps", f"{self.me}:{rows[-1][0]}", {"rows": rows})
            self.journal.told(rows)

    def _carry_out(self, action: actions.Propose | actions.GrantSlot) -> None:
        registry = self._registry
        if isinstance(action, actions.GrantSlot):
            self._granted[action.token] = action  # should the answer get lost
            given = registry.grant(action.slot, action.generation, action.token, self.me)
            del self._granted[action.token]
            if given:
                self._start(action)
            return
        proposal = action.proposal
        if proposal.kind == "restore":
            accepted = registry.restore(self._spec_text, proposal.view.slots, proposal)
        else:
            accepted = registry.propose(proposal)
        self._post(lambda core, now: core.on_proposed(proposal, accepted, now))

    def _find_lost_grants(self, snapshot: Snapshot) -> None:
        for grant in snapshot.grants.values():
            action = self._granted.pop(grant.token, None)
            if action is not None and not grant.claimant:
                self._start(action)
        self._granted.clear()

    def _start(self, action: actions.GrantSlot) -> None:
        self.invoke(self._payload(action.slot, action.generation, action.token, action.predecessor))

    # --- invocations ------------------------------------------------------------------------

    def _invite(self) -> None:
        while (payload := self._invocations.get()) is not None:
            try:
                self._hand_to_platform(payload)
            except PlatformUnavailable as error:
                # the grant lapses, and somebody will try again
                what = ".".join(
                    str(payload[key]) for key in ("slot", "generation", "step") if key in payload
                )
                self.event("warning", f"invoke {what}", {"text": str(error)})
            except MayflyError as error:
                self.event("warning", "invoke", {"text": str(error)})
