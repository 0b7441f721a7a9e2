"""Who waits to be let in, as one member hears them: whether they are there, and how close. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from fault.records import Peer, Timing

CLOSE_STEPS = 4
"""A candidate this close catches up within a step."""
PATIENCE_S = 3.0
"""After so long a candidate is let in wherever it stands: it may never come closer."""


class Candidates:
    """Those that one member has heard of."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._heard_at: dict[Peer, float] = {}
        self._had_state_since: dict[Peer, float] = {}
        self._was_close_at: dict[Peer, float] = {}
        """When a candidate last held a state that was hardly older than this member's."""

    def hear(self, peer: Peer, step: int, own_step: int, now: float) -> None:
        """A candidate says that it is there; with a state of `step`, or -1 for none."""
        self._heard_at[peer] = now
        if step < 0:
            self._had_state_since.pop(peer, None)
            return
        self._had_state_since.setdefault(peer, now)
        if step >= own_step - CLOSE_STEPS:
            self._was_close_at[peer] = now

    def forget(self, peers: Iterable[Peer]) -> None:
        """They are members now."""
        for records in (self._heard_at, self._had_state_since, self._was_close_at):
            for peer in peers:
                records.pop(peer, None)

    def is_there(self, peer: Peer, now: float) -> bool:
        return now - self._heard_at.get(peer, -float("inf")) < self._timing.ready_ttl_s

    def may_join(self, peer: Peer, now: float) -> bool:
        """It is there, it holds a state, and it is close to where this member is."""
        since = self._had_state_since.get(peer)
        if since is None or not self.is_there(peer, now):
            return False
        close = now - self._was_close_at.get(peer, -float("inf")) < self._timing.ready_ttl_s
        return close or now - since > PATIENCE_S
