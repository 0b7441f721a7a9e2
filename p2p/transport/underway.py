"""What is on its way between a peer and another, as far as this end of it can tell."""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import Peer
from p2p.transport.direct import DirectLinks
from p2p.transport.link import ControlAndBulk


@dataclass(frozen=True, slots=True)
class LinksUnderway:
    """Over its links to others, and to relays, from which all that comes shares one way."""

    direct: DirectLinks
    relayed: ControlAndBulk

    def arrives_from(self, peer: Peer) -> bool:
        if self.direct.hears(peer):
            return self.direct.arrives_from(peer) or self.relayed.arrives_from(peer.encode())
        return self.relayed.arrives

    def leaves_to(self, peer: Peer) -> bool:
        return self.direct.leaves_to(peer) or self.relayed.leaves_to(peer.encode())
