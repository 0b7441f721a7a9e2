"""What opens a connection of our own, and what seals it: AES-256-GCM (NIST SP 800-38D).

A key is for one connection. The nonce is the direction and a count, so none is used twice, and
whoever changes, repeats, reorders or leaves out a record is found out by the next.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2p.transport.wire import Frame

TAG_BYTES, KEY_BYTES, TICKET_BYTES = 16, 32, 16
OUTWARD, INWARD = 0, 1
"""The directions, as whoever has dialled sees them."""
_NONCE = struct.Struct("<IQ")
_INVITATION = struct.Struct(f"<H{TICKET_BYTES}s")


class Forged(Exception):
    """What arrived is not what was sealed."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a connection can be opened with, once."""

    port: int
    """0 where there are Unix sockets only."""
    ticket: bytes = field(repr=False)
    key: bytes = field(repr=False)
    """Empty where nothing is sealed."""

    def to_bytes(self) -> bytes:
        return _INVITATION.pack(self.port, self.ticket) + self.key

    @classmethod
    def from_bytes(cls, data: Frame) -> Invitation:
        """Raises ValueError."""
        if len(data) not in (_INVITATION.size, _INVITATION.size + KEY_BYTES):
            raise ValueError(f"an invitation of {len(data)} bytes")
        port, ticket = _INVITATION.unpack_from(data)
        return cls(port, ticket, bytes(data[_INVITATION.size :]))


class Seal:
    """One direction of one connection, at one end."""

    def __init__(self, key: bytes, direction: int) -> None:
        self._cipher = AESGCM(key)
        self._direction = direction
        self._count = 0

    def close(self, plain: Frame, sealed: memoryview) -> None:
        """Writes the record and its tag."""
        self._cipher.encrypt_into(self._nonce(), plain, None, sealed)

    def open(self, sealed: memoryview, plain: memoryview) -> None:
        """Raises Forged, and what is in `plain` then is nothing."""
        try:
            self._cipher.decrypt_into(self._nonce(), sealed, None, plain)
        except InvalidTag:
            raise Forged("what arrived is not what was sealed") from None

    def _nonce(self) -> bytes:
        self._count += 1
        return _NONCE.pack(self._direction, self._count)
