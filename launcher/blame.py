"""The platform's word on deaths: members see that a peer is gone, the platform knows of what.

It reaches the registry, where members count what kills them, and the supervisor's own counts of
boots that fail and of a run that stands still. What follows from these is `revival.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fault.records import Peer
from fault.registry import Registry
from launcher.revival import Boots, Standstill

BLAME_SECONDS = 6.0
"""How long the word on a death is repeated: the members may take a while to notice it."""
CLAIMS_KEPT = 4096
"""Far more than there can be invocations whose end has not been heard of yet."""


class Blame:
    """Follows the invocations of one run. `now` is any clock that only goes forward."""

    def __init__(self, boots: Boots, standstill: Standstill) -> None:
        self._boots = boots
        self._standstill = standstill
        self._peers: dict[tuple[int, int], Peer] = {}
        """By (slot, generation): who claimed that grant."""
        self._causes: dict[Peer, tuple[str, float]] = {}

    def claimed(self, peer: Peer) -> None:
        slot, generation, _ = peer.split(".")
        self._peers[int(slot), int(generation)] = peer
        if len(self._peers) > CLAIMS_KEPT:
            del self._peers[next(iter(self._peers))]

    def hear(self, ended: Mapping[str, Any], step: int, now: float) -> None:
        """Takes in what the platform says of one; `step` is the newest that was reached."""
        event, cause = ended["event"] or {}, ended["cause"]
        if cause == "ok" or "generation" not in event:
            return
        slot, generation = event["slot"], event["generation"]
        out_of_memory = cause == "out of memory"
        error = "OutOfMemory" if out_of_memory else "BootFailed"
        self._boots.failed(f"{slot}.{generation}", ended.get("detail") or cause, error)
        peer = self._peers.get((slot, generation))
        if peer is None:
            return
        if out_of_memory or cause == "crash":
            self._standstill.died(peer, cause, step)
        if out_of_memory:
            self._causes[peer] = cause, now + BLAME_SECONDS

    def tell(self, registry: Registry, now: float) -> None:
        """Raises RegistryUnavailable; what was not told is told the next time."""
        for peer, (cause, until) in list(self._causes.items()):
            registry.blame(peer, cause)
            if now > until:
                del self._causes[peer]
