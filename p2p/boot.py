"""A process that boots has no core yet, only a claim to keep; what it sees meanwhile counts."""

from __future__ import annotations

from fault.records import Snapshot


class BootWatch:
    """Takes the registry's answers while the task is being built: is there a member at all?

    It stands in the core's place, so it has the two methods of it that the registry's thread calls.
    """

    def __init__(self) -> None:
        self.memberless_since = float("inf")
        """Since when no member of the view held a lease, in unbroken contact and one life."""
        self.life = ""
        self.out: list[object] = []

    def on_snapshot(self, snapshot: Snapshot, now: float) -> None:
        if snapshot.life != self.life:
            self.life, self.memberless_since = snapshot.life, float("inf")
        members = snapshot.view.members if snapshot.view is not None else ()
        if not members or any(peer in snapshot.leased for peer in members):
            self.memberless_since = float("inf")
        else:
            self.memberless_since = min(self.memberless_since, now)

    def on_contact_failed(self, now: float) -> None:
        self.memberless_since = float("inf")
