"""What is on its way between a peer and another, as far as this end of it can tell."""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import Peer
from p2p.transport.direct import DirectLinks
from p2p.transport.link import ControlAndBulk


@dataclass(frozen=True, slots=True)
class Underway:
    """Over its links to others, and over those to relays, of which all of a peer's messages share
    one way."""

    direct: DirectLinks
    relayed: ControlAndBulk

    def arrives_from(self, peer: Peer) -> bool:
        if self.direct.hears(peer):
            return self.direct.arrives_from(peer)
        return self.relayed.arrives

    def leaves_to(self, peer: Peer) -> bool:
        return self.direct.leaves_to(peer) or self.relayed.leaves
