"""What is on its way, as far as the driver can tell. Sans-I/O."""

from __future__ import annotations

from typing import Protocol

from fault.records import Peer


class Underway(Protocol):
    """A way on which nothing moves has nothing on it."""

    def arrives_from(self, peer: Peer) -> bool:
        """Whether the beginning of something large has come that may be the peer's, and more of it
        keeps coming."""

    def leaves_to(self, peer: Peer) -> bool:
        """Whether something large for the peer is being sent, or waits for what is."""


class NothingUnderway:
    """Messages come as a whole or not at all."""

    def arrives_from(self, peer: Peer) -> bool:
        return False

    def leaves_to(self, peer: Peer) -> bool:
        return False
