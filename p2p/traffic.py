"""What went between a peer and the others, counted where it is sent and taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Since the peer came. Bytes are those of payloads; small messages have none."""

    relayed: int = 0
    """Messages handed to relays,"""
    relayed_bytes: int = 0
    direct: int = 0
    """to links past them with all their bytes,"""
    direct_bytes: int = 0
    named: int = 0
    """and to such links by the place of their bytes, which others read there."""
    named_bytes: int = 0
    dropped: int = 0
    """Found no way with room."""
    received: int = 0
    malformed: int = 0
    refused: int = 0
    """Messages and connections at its own endpoints of whom it does not know, or has let go of,"""
    refused_keys: int = 0
    """and connections there with another key than the run's."""
    gone: int = 0
    """Their bytes were not in their place any more."""
    asks: int = 0
    """Messages that ask for what is missing."""
    again: int = 0
    """Segments sent because they were asked for."""
    waited_s: float = 0.0
    """From its own last contribution to the step's mean, in all steps together."""

    def relays(self, size: int, taken: bool) -> None:
        if taken:
            self.relayed += 1
            self.relayed_bytes += size
        else:
            self.dropped += 1
